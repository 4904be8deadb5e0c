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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.distributed.dtensor import all_reduce, is_dtensor, loaded, refuse_flattened, refuse_partial
from fastsam.kernels.tensor_list import buckets

PerturbSync = Literal["global", "replica"] | int


class ParallelModel:
    """The ranks that train one model, as copies (DDP) or in shards (FSDP2).

    Args:
        model: the module or wrapper that the loss uses, or None.
        params: the optimizer's parameters.
        perturb_sync: who shares a perturbation: all ranks, nobody, or groups of so many neighbouring ranks, which all
            ranks must then set up together.

    Raises:
        ValueError: perturb_sync is unknown, does not divide the ranks, or cannot be had with this model; or weights are
            sharded by FSDP1.
    """

    def __init__(self, model: nn.Module | None, params: Sequence[Tensor], perturb_sync: PerturbSync) -> None:
        refuse_partial(params)
        refuse_flattened(params)
        modules = list(model.modules()) if model is not None else []
        self._ddp = [m for m in modules if isinstance(m, DistributedDataParallel)]
        self._fsdp = [m for m in modules if isinstance(m, loaded("torch.distributed.fsdp", "FSDPModule"))]
        self._reductions: dict[DistributedDataParallel, _Reduction] = {}
        self._world = self._ddp[0].process_group if self._ddp else None
        size = dist.get_world_size(self._world) if _is_running() else 1
        sharing = _ranks_sharing(perturb_sync, size)
        self.is_local = sharing < size
        self._is_sharded = bool(self._fsdp) or any(map(is_dtensor, params))
        if size > 1:
            self._check(model, perturb_sync)
        self._sharing = sharing
        self._group = _own_group(self._world, sharing) if 1 < sharing < size else self._world

    def _check(self, model: nn.Module | None, perturb_sync: PerturbSync) -> None:
        """Raise or warn where several ranks would not train as they were asked to."""
        if self.is_local and (reason := self._reason_against_local_ascents(model)):
            raise ValueError(f"perturb_sync={perturb_sync!r} {reason}, or use perturb_sync='global'")
        if self.is_local and model is not None and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            warnings.warn(
                f"SyncBatchNorm mixes the statistics of ranks whose weights differ under perturb_sync={perturb_sync!r}",
                stacklevel=6,
            )
        if model is not None and not self._ddp and not self._is_sharded:
            warnings.warn(
                f"{dist.get_world_size()} processes run, but model is a plain {type(model).__name__}: unless something "
                "else reduces gradients, ranks drift apart. Pass the DistributedDataParallel module that the loss "
                "uses.",
                stacklevel=6,
            )

    def _reason_against_local_ascents(self, model: nn.Module | None) -> str | None:
        if self._is_sharded:
            return "needs all weights on every rank, but these are sharded; use DistributedDataParallel"
        if not self._ddp:
            return (
                "needs model=, the DistributedDataParallel module that the loss uses, to keep its ranks' gradients "
                f"apart, but got {type(model).__name__}; pass it"
            )
        return None

    @property
    def reduce_in_backward(self) -> bool:
        """Whether DDP reduces gradients while a backward runs, and waits for each of them."""
        return bool(self._ddp)

    @property
    def may_skip_gradients(self) -> bool:
        """Whether a backward may leave some gradients out."""
        return not any(ddp.static_graph for ddp in self._ddp)

    @property
    def are_several(self) -> bool:
        """Whether a step takes several processes."""
        return bool(self._ddp) or self._is_sharded

    def overwrites_gradients(self, unreduced: bool) -> bool:
        """Whether a backward may write over gradients that were set aside, which DDP keeps in its buckets."""
        if self._ddp:
            return any(d.gradient_as_bucket_view and (d.static_graph or not unreduced) for d in self._ddp)
        # There may be a DDP module that we were not given.
        return _is_running() and not self._fsdp and not unreduced

    def no_sync(self) -> ExitStack:
        """Context in which forwards and backwards leave this rank's own gradients.

        Raises:
            RuntimeError: the model was built with static_graph=True, and has a communication hook already.
        """
        contexts = ExitStack()
        for ddp in self._ddp:
            contexts.enter_context(self._reduction_of(ddp).left_out() if ddp.static_graph else ddp.no_sync())
        return contexts

    def _reduction_of(self, ddp: DistributedDataParallel) -> "_Reduction":
        if ddp not in self._reductions:
            self._reductions[ddp] = _Reduction(ddp)
        return self._reductions[ddp]

    @property
    def is_inside_no_sync(self) -> bool:
        """Whether somebody has told DDP to leave gradients unreduced."""
        return any(not ddp.require_backward_grad_sync for ddp in self._ddp)

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
        device = next(self._ddp[0].parameters()).device
        raised = torch.zeros((), device=device) if flag is None else flag.to(device, torch.float32)
        all_reduce(raised, self._world, dist.ReduceOp.MAX, "the flag of a non-finite ascent")
        return raised != 0

    def reshard(self) -> None:
        """Drop FSDP2's gathered copies of the weights, which do not follow when a rank's own entries change."""
        for module in self._fsdp:
            module.reshard()


class _Reduction:
    """DDP's mean over ranks as a communication hook that can leave it out, since a static graph refuses no_sync()."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.is_left_out, self.group = False, ddp.process_group
        try:
            ddp.register_comm_hook(self, _reduce)
        except RuntimeError as error:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) leaves its reduction out by a communication hook, but has "
                "one already; drop static_graph, or that hook"
            ) from error

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave gradients as they are on each rank."""
        self.is_left_out = True
        try:
            yield
        finally:
            self.is_left_out = False


def _reduce(reduction: _Reduction, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    gradients = bucket.buffer()
    if reduction.is_left_out:
        done: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[gradients.device] if gradients.is_cuda else None
        )
        done.set_result(gradients)
        return done
    gradients.div_(dist.get_world_size(reduction.group))
    work = dist.all_reduce(gradients, group=reduction.group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def check_perturb_sync(perturb_sync: Any) -> None:
    """Raise ValueError unless this says who shares a perturbation."""
    is_size = isinstance(perturb_sync, int) and not isinstance(perturb_sync, bool) and perturb_sync > 0
    if not is_size and perturb_sync not in ("global", "replica"):
        raise ValueError(f"perturb_sync must be 'global', 'replica' or a number of ranks, got {perturb_sync!r}")


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
