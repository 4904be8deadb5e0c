"""Ranks: which of them share a perturbation, when gradients are reduced, and what one rank holds of a weight.

Under DistributedDataParallel (DDP), with W ranks of which groups of g share a perturbation (docs/algorithms.md#r-10):

    g_r    = grad of rank r's mean loss at w
    eps    = the method's perturbation for the mean of g_r over r's group      (g = W: "global", g = 1: "replica")
    d      = mean over all W ranks of grad at w + eps                          (g < W is mSAM with W / g shards)

With g = W the ascent's backward reduces as every backward of DDP does. With g < W it runs under no_sync(), which for a
static graph is a communication hook that can leave its work undone; for g > 1 one flat all-reduce within the group
follows. Only the descent's gradients travel between all ranks, in DDP's buckets, while its backward still runs. p.grad
is None in the ascent, so that DDP's buckets keep out of it even in the forward that makes them anew. DDP weighs ranks
equally whatever their batch sizes are, and so does this.

Under fully_shard (FSDP2) and tensor parallelism weights are DTensors. Their gradients are complete, so the perturbation
is global; kernels are given each rank's own entries, and norms and flags are reduced over the ranks that share a
tensor (sharded.py).

A rank that stops makes the others' next collective fail, at once or after the process group's timeout.
"""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam.arguments import shown
from fastsam.distributed.dtensor import all_reduce, is_dtensor, largest_over_ranks, loaded
from fastsam.distributed.peers import Peers, norm_of, other_seed
from fastsam.distributed.reducer import reducers_of
from fastsam.distributed.unsupported import refuse_pipelines, refuse_unsupported
from fastsam.kernels.tensor_list import buckets

PerturbSync = Literal["global", "replica"] | int


class ParallelModel:
    """The ranks that train one model, as copies (DDP) or in shards (FSDP2).

    Built when the first step begins, since frameworks wrap models and start process groups after the optimizer is made;
    on all ranks together.

    Args:
        model: the module or wrapper that the loss uses, or None.
        params: the optimizer's parameters.
        perturb_sync: who shares a perturbation: all ranks, nobody, or groups of so many neighbouring ranks; None for
            what the method takes by itself.
        under_ddp: what None means where DDP reduces; elsewhere it means "global".

    Raises:
        ValueError: perturb_sync does not divide the ranks, or cannot be had with this model; or weights lie on the
            ranks in a way that does not tell a norm.
    """

    def __init__(
        self,
        model: nn.Module | None,
        params: Sequence[Tensor],
        perturb_sync: PerturbSync | None,
        under_ddp: Literal["global", "replica"] = "global",
    ) -> None:
        refuse_unsupported(params)
        refuse_pipelines(params)
        modules = list(model.modules()) if model is not None else []
        self._reducers = reducers_of(modules)
        self._fsdp = [m for m in modules if isinstance(m, loaded("torch.distributed.fsdp", "FSDPModule"))]
        self._fsdp_groups = [group for m in self._fsdp for group in _parameter_groups(m)]
        self._world = self._reducers[0].ddp.process_group if self._reducers else None
        self.perturb_sync = perturb_sync or (under_ddp if self._reducers else "global")
        _refuse_several_groups([r.ddp.process_group for r in self._reducers])
        size = dist.get_world_size(self._world) if _is_running() else 1
        sharing = _ranks_sharing(self.perturb_sync, size)
        self.is_local = sharing < size
        self.is_sharded = bool(self._fsdp) or any(map(is_dtensor, params))
        """Whether weights are DTensors, whose gradients every backward completes."""
        if self.is_local:
            self._check_local_ascents(model)
        is_known = self._reducers or self.is_sharded
        self._peers = None if is_known or size == 1 else Peers(params)
        self._sharing = sharing
        self._group = _own_group(self._world, sharing) if 1 < sharing < size else self._world

    def _check_local_ascents(self, model: nn.Module | None) -> None:
        """Raise ValueError or warn where ranks cannot perturb by themselves."""
        if reason := self._reason_against_local_ascents(model):
            raise ValueError(f"perturb_sync={self.perturb_sync!r} {reason}, or use perturb_sync='global'")
        if model is not None and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            warnings.warn(
                "SyncBatchNorm mixes the statistics of ranks whose weights differ under "
                f"perturb_sync={self.perturb_sync!r}",
                stacklevel=7,
            )

    def _reason_against_local_ascents(self, model: nn.Module | None) -> str | None:
        if self.is_sharded:
            return "needs all weights on every rank, but these are sharded; use DistributedDataParallel"
        if not self._reducers:
            return (
                "needs model=, the DistributedDataParallel module that the loss uses, to keep its ranks' gradients "
                f"apart, but got {type(model).__name__}; pass it"
            )
        return None

    def refuse_other_seeds(self, seed: int, params: Sequence[Tensor]) -> None:
        """Raise ValueError unless all ranks that train the model have the same seed."""
        if self._peers is not None:
            self._peers.refuse_other_seeds(seed)
            return
        if not self.are_several:
            return
        number = seed % 2**62
        ends = torch.tensor([number, -number], device=params[0].device)
        if self._reducers:
            all_reduce(ends, self._world, dist.ReduceOp.MAX, "the seed")
        elif self.is_sharded:
            largest_over_ranks(ends, params, "the seed")
        if ends[0] != -ends[1]:
            raise ValueError(other_seed(seed, "another rank has another one"))

    def compare(self, groups: Sequence[dict[str, Any]]) -> None:
        """Warn once if final gradients differ between ranks of which nobody has said how they are reduced."""
        if self._peers is not None and self._peers.compare([p.grad for group in groups for p in group["params"]]):
            self._peers = None

    @property
    def reduce_in_backward(self) -> bool:
        """Whether DDP reduces gradients while a backward runs, and waits for each of them."""
        return bool(self._reducers)

    @property
    def may_skip_gradients(self) -> bool:
        """Whether a backward may leave some gradients out, in no_sync() where DDP would wait for them."""
        if self._reducers:
            return not any(r.ddp.static_graph for r in self._reducers)
        # There may be a DDP module that we were not given.
        return not (self.is_sharded or _is_running())

    @property
    def are_several(self) -> bool:
        """Whether a step takes several processes."""
        return bool(self._reducers) or self.is_sharded

    def overwrites_gradients(self, unreduced: bool) -> bool:
        """Whether a backward may write over gradients that were set aside, which DDP keeps in its buckets."""
        if self._reducers:
            ddps = [r.ddp for r in self._reducers]
            return any(d.gradient_as_bucket_view and (d.static_graph or not unreduced) for d in ddps)
        # There may be a DDP module that we were not given.
        return _is_running() and not self._fsdp and not unreduced

    def no_sync(self) -> ExitStack:
        """Context in which forwards and backwards leave this rank's own gradients.

        Raises:
            RuntimeError: the model was built with static_graph=True, and has a communication hook already.
        """
        contexts = ExitStack()
        for reducer in self._reducers:
            contexts.enter_context(reducer.left_out())
        return contexts

    @property
    def is_inside_no_sync(self) -> bool:
        """Whether somebody has told DDP to leave gradients unreduced."""
        return any(r.is_switched_off for r in self._reducers)

    @property
    def left_unreduced(self) -> bool:
        """Whether the last forward may have left gradients unreduced; it says so too of one without gradients."""
        return self.is_inside_no_sync or any(r.left_unreduced for r in self._reducers)

    def refuse_kept_gradients(self, call: str) -> None:
        """Raise RuntimeError if FSDP2 keeps unreduced gradients to itself, so that a pass would leave none.

        Args:
            call: what the user has called.
        """
        if not all(group.reduce_grads and group.all_reduce_grads for group in self._fsdp_groups):
            raise RuntimeError(
                f"{call} under set_requires_gradient_sync(False) or set_requires_all_reduce(False): FSDP2 would keep "
                "the first pass's gradient to itself, and add it to the second's. Leave both True; to accumulate, run "
                "a pair of `with opt.ascent(): ...` and `with opt.descent(): ...` for each part"
            )

    def agree(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether all ranks hold the same gradients; reads the device, for a step that may have left them unreduced."""
        norm = norm_of(grads, self._device)
        ends = torch.stack([norm, -norm])
        all_reduce(ends, self._world, dist.ReduceOp.MAX, "the norm of the final gradient")
        return bool(ends[0] == -ends[1]) or not bool(ends.isfinite().all())

    def average(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the means of local gradients over the ranks that share a perturbation.

        Args:
            params: parameters, the same on every rank.
            grads: their gradients, overwritten; None counts as zeros where others take part.
        """
        return self._mean(params, grads, self._group, self._sharing, "the ascent gradient")

    def average_over_all(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the means of local gradients over all ranks; arguments as those of `average`."""
        size = dist.get_world_size(self._world)
        return self._mean(params, grads, self._world, size, "the combined gradient")

    @torch.no_grad()
    def _mean(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], group: Any, size: int, what: str
    ) -> Sequence[Tensor | None]:
        if size == 1:
            return grads
        means = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        for rows in buckets((g.device, g.dtype) for g in means):
            parts = [means[i] for i in rows]
            flat = torch.cat([part.reshape(-1) for part in parts]).div_(size)
            all_reduce(flat, group, dist.ReduceOp.SUM, what)
            pieces = flat.split([part.numel() for part in parts])
            torch._foreach_copy_(parts, [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)])
        return means

    def any(self, flag: Tensor | None) -> Tensor | None:
        """Whether a rank's flag is set, where ranks perturb differently; elsewhere the flag, which is equal on all."""
        if not self.is_local:
            return flag
        device = self._device
        raised = torch.zeros((), dtype=torch.float32, device=device) if flag is None else flag.to(device, torch.float32)
        all_reduce(raised, self._world, dist.ReduceOp.MAX, "the flag of a non-finite ascent")
        return raised != 0

    @property
    def _device(self) -> torch.device:
        return next(self._reducers[0].ddp.parameters()).device

    def reshard(self) -> None:
        """Drop FSDP2's gathered copies of the weights, which do not follow when a rank's own entries change."""
        for module in self._fsdp:
            module.reshard()


def check_perturb_sync(perturb_sync: Any) -> None:
    """Raise ValueError unless this says who shares a perturbation, or leaves it to the method (None)."""
    is_size = isinstance(perturb_sync, int) and not isinstance(perturb_sync, bool) and perturb_sync > 0
    is_word = perturb_sync is None or (isinstance(perturb_sync, str) and perturb_sync in ("global", "replica"))
    if not is_size and not is_word:
        raise ValueError(
            f"perturb_sync must be None, 'global', 'replica' or a number of ranks, got {shown(perturb_sync)}"
        )


def _parameter_groups(module: Any) -> list[Any]:
    """FSDP2's own groups of a module's weights, one of them or, in later versions of torch, a list."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(filter(None, [state._fsdp_param_group] if groups is None else groups))


def _refuse_several_groups(groups: Sequence[Any]) -> None:
    """Raise ValueError if modules of one optimizer are copied among different ranks, as experts are."""
    ranks = {tuple(dist.get_process_group_ranks(group)) for group in groups}
    if len(ranks) > 1:
        raise ValueError(
            f"model holds DistributedDataParallel modules over the ranks {' and '.join(map(str, sorted(ranks)))}: some "
            "ranks hold other weights than others, and each would perturb by the norm of its own; use fully_shard "
            "(FSDP2), whose weights know their ranks"
        )


def _is_running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _ranks_sharing(perturb_sync: PerturbSync, size: int) -> int:
    """How many of `size` ranks share a perturbation."""
    if isinstance(perturb_sync, str):
        return size if perturb_sync == "global" else 1
    if size % perturb_sync:
        raise ValueError(f"perturb_sync={perturb_sync} does not divide the {size} ranks into equal groups")
    return perturb_sync


def _own_group(world: Any, sharing: int) -> Any:
    """This rank's group; torch wants every rank to make all of them, in one order."""
    ranks = dist.get_process_group_ranks(world)
    if len(ranks) != dist.get_world_size():
        raise ValueError(
            f"perturb_sync={sharing} needs a model on all {dist.get_world_size()} processes, but its process group has "
            f"{len(ranks)}; use 'global' or 'replica'"
        )
    groups = [dist.new_group(ranks[i : i + sharing]) for i in range(0, len(ranks), sharing)]
    return groups[dist.get_rank() // sharing]
