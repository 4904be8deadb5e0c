"""Ranks: which of them share a perturbation, when gradients are reduced, and what one rank holds of a weight.

Under DistributedDataParallel (DDP), with W ranks of which groups of g share a perturbation (SPEC R-10):

    g_r    = grad of rank r's mean loss at w
    eps    = the method's perturbation for the mean of g_r over r's group      (g = W: "global", g = 1: "replica")
    d      = mean over all W ranks of grad at w + eps                          (g < W is mSAM with W / g shards)

With g = W the ascent's backward reduces as every backward of DDP does. With g < W it runs under no_sync(), and for
g > 1 one flat all-reduce within the group follows it; only the descent's gradients travel between all ranks, in DDP's
buckets, while its backward still runs. p.grad is None in the ascent, so that DDP's buckets keep out of it even in the
forward that makes them anew. DDP weighs ranks equally whatever their batch sizes are, and so does this.

Under fully_shard (FSDP2) and tensor parallelism weights are DTensors. Their gradients are complete, so the perturbation
is global; kernels are given each rank's own entries, and norms and flags are reduced over the ranks that share a
tensor.

A rank that stops makes the others' next collective fail, at once or after the process group's timeout.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.kernels.tensor_list import buckets

PerturbSync = Literal["global", "replica"] | int


class Replicas:
    """The ranks that train one model, as copies (DDP) or in shards (FSDP2).

    Args:
        model: the module or wrapper that the loss uses, or None.
        params: the optimizer's parameters.
        perturb_sync: who shares a perturbation: all ranks, nobody, or groups of so many neighbouring ranks, which all
            ranks must then set up together.

    Raises:
        ValueError: perturb_sync is unknown, does not divide the ranks, or cannot be had with this model.
    """

    def __init__(self, model: nn.Module | None, params: Sequence[Tensor], perturb_sync: PerturbSync) -> None:
        _refuse_partial(params)
        modules = list(model.modules()) if model is not None else []
        self._ddp = [m for m in modules if isinstance(m, DistributedDataParallel)]
        self._fsdp = [m for m in modules if isinstance(m, _loaded("torch.distributed.fsdp", "FSDPModule"))]
        self._world = self._ddp[0].process_group if self._ddp else None
        size = dist.get_world_size(self._world) if _is_running() else 1
        sharing = _ranks_sharing(perturb_sync, size)
        self.is_local = sharing < size
        if size > 1:
            self._check(model, params, perturb_sync)
        self._sharing = sharing
        self._group = _own_group(self._world, sharing) if 1 < sharing < size else self._world

    def _check(self, model: nn.Module | None, params: Sequence[Tensor], perturb_sync: PerturbSync) -> None:
        """Raise or warn where several ranks would not train as they were asked to."""
        is_sharded = bool(self._fsdp) or any(isinstance(p, _dtensors()) for p in params)
        if self.is_local and (reason := self._reason_against_local_ascents(model, is_sharded)):
            raise ValueError(f"perturb_sync={perturb_sync!r} {reason}, or use perturb_sync='global'")
        if self.is_local and model is not None and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            warnings.warn(
                f"SyncBatchNorm mixes the statistics of ranks whose weights differ under perturb_sync={perturb_sync!r}",
                stacklevel=6,
            )
        if model is not None and not self._ddp and not is_sharded:
            warnings.warn(
                f"{dist.get_world_size()} processes run, but model is a plain {type(model).__name__}: unless something "
                "else reduces gradients, ranks drift apart. Pass the DistributedDataParallel module that the loss "
                "uses.",
                stacklevel=6,
            )

    def _reason_against_local_ascents(self, model: nn.Module | None, is_sharded: bool) -> str | None:
        if is_sharded:
            return "needs all weights on every rank, but these are sharded; use DistributedDataParallel"
        if not self._ddp:
            return (
                "needs model=, the DistributedDataParallel module that the loss uses, to keep its ranks' gradients "
                f"apart, but got {type(model).__name__}; pass it"
            )
        if not self.may_skip_gradients:
            return (
                "cannot be had with DistributedDataParallel(static_graph=True), which reduces its first pass in any "
                "case; drop static_graph"
            )
        return None

    @property
    def reduce_in_backward(self) -> bool:
        """Whether DDP reduces gradients while a backward runs, and waits for each of them."""
        return bool(self._ddp)

    @property
    def may_skip_gradients(self) -> bool:
        """Whether a backward may leave some gradients out, or unreduced."""
        return not any(ddp.static_graph for ddp in self._ddp)

    @property
    def overwrites_gradients(self) -> bool:
        """Whether a reducing backward may write over gradients that were set aside, which DDP keeps in its buckets."""
        if self._ddp:
            return any(ddp.gradient_as_bucket_view for ddp in self._ddp)
        return _is_running() and not self._fsdp  # there may be a DDP module that we were not given

    def no_sync(self) -> ExitStack:
        """Context in which forwards and backwards leave this rank's own gradients.

        Raises:
            RuntimeError: the model was built with static_graph=True.
        """
        if not self.may_skip_gradients:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) has to reduce in every pass; drop static_graph, or "
                "sync=False"
            )
        contexts = ExitStack()
        for ddp in self._ddp:
            contexts.enter_context(ddp.no_sync())
        return contexts

    @torch.no_grad()
    def average(self, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the means of local gradients over the ranks that share a perturbation.

        Args:
            params: parameters, the same on every rank.
            grads: their gradients, overwritten; None counts as zeros where others take part.
        """
        if self._sharing == 1:
            return grads
        means = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        for rows in buckets((g.device, g.dtype) for g in means):
            parts = [means[i] for i in rows]
            flat = torch.cat([part.reshape(-1) for part in parts]).div_(self._sharing)
            _all_reduce(flat, self._group, dist.ReduceOp.SUM, "the ascent gradient")
            pieces = flat.split([part.numel() for part in parts])
            torch._foreach_copy_(parts, [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)])
        return means

    def any(self, flag: Tensor | None) -> Tensor | None:
        """Whether a rank's flag is set, where ranks perturb differently; elsewhere the flag, which is equal on all."""
        if not self.is_local:
            return flag
        device = next(self._ddp[0].parameters()).device
        raised = torch.zeros((), device=device) if flag is None else flag.to(device, torch.float32)
        _all_reduce(raised, self._world, dist.ReduceOp.MAX, "the flag of a non-finite ascent")
        return raised != 0

    def reshard(self) -> None:
        """Drop FSDP2's gathered copies of the weights, which do not follow when a rank's own entries change."""
        for module in self._fsdp:
            module.reshard()


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


def _all_reduce(tensor: Tensor, group: Any, op: Any, what: str) -> None:
    try:
        dist.all_reduce(tensor, op, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"fastsam could not reduce {what} on rank {dist.get_rank()}: another rank has stopped or waits elsewhere; "
            "its own output says why"
        ) from error


# DTensors


def _loaded(module: str, name: str) -> Any:
    """A class for isinstance, if its module is loaded: importing DTensor takes longer than all of fastsam."""
    return getattr(sys.modules.get(module), name, ())


def _dtensors() -> Any:
    return _loaded("torch.distributed.tensor", "DTensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's own entries of a DTensor, in its memory; any other tensor as it is."""
    # to_local() of a parameter is another tensor in every call, but a backup knows its weights by identity
    return tensor._local_tensor if isinstance(tensor, _dtensors()) else tensor


@torch.no_grad()
def laid_out_as(param: Any, grad: Any) -> Tensor:
    """A DTensor gradient spread as its parameter is, its parts summed; any other gradient as it is."""
    if isinstance(grad, _dtensors()) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad


def _refuse_partial(params: Sequence[Any]) -> None:
    for p in params:
        if isinstance(p, _dtensors()) and any(placement.is_partial() for placement in p.placements):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is a sum over ranks (Partial), of which nobody holds a weight "
                "to perturb; redistribute it"
            )


class Spread(NamedTuple):
    """How a tensor lies on several ranks: split along these dimensions of the mesh, copied along the others."""

    mesh: Any
    dims: tuple[int, ...]


def spread(tensor: Tensor) -> Spread | None:
    """How a DTensor is spread; None for any other tensor."""
    if not isinstance(tensor, _dtensors()):
        return None
    # the strided shards of two-dimensional meshes do not call themselves shards
    return Spread(tensor.device_mesh, tuple(d for d, p in enumerate(tensor.placements) if not p.is_replicate()))


def first_element(tensor: Any) -> int | None:
    """Which element of the whole tensor, in memory order, this rank's first one is; None where that does not say all.

    Shards of whole rows, as fully_shard makes them, are one stretch of a contiguous tensor. Shards of columns are not,
    nor may those be that torch calls strided, of weights that are both tensor parallel and fully sharded. A complex
    number counts as two elements.
    """
    if not isinstance(tensor, _dtensors()) or all(p.is_replicate() for p in tensor.placements):
        return 0
    if not tensor.is_contiguous() or not all(p.is_replicate() or p.is_shard(0) for p in tensor.placements):
        return None
    row_length = prod(tensor.shape[1:]) * (2 if tensor.is_complex() else 1)
    return _first_row(tensor.shape, tensor.device_mesh, tensor.placements) * row_length


@lru_cache(1024)
def _first_row(shape: torch.Size, mesh: Any, placements: Any) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)[1][0]


def shard_number(spread: Spread | None) -> int:
    """Which of a tensor's shards this rank holds, counted along the mesh; 0 for a whole one."""
    number = 0
    for d in spread.dims if spread else ():
        number = number * spread.mesh.size(d) + spread.mesh.get_local_rank(d)  # type: ignore[union-attr]
    return number


@torch.no_grad()
def norm_over_ranks(norm_of: Callable[[list[int]], Tensor], spreads: Sequence[Spread | None]) -> Tensor:
    """Return the 2-norm over all entries of a list of tensors, each entry counted once however many ranks hold it.

    Args:
        norm_of: returns the norm over this rank's own entries of the tensors at these positions, 0-dim float64.
        spreads: how each tensor is spread.
    """
    if not any(spreads):
        return norm_of(list(range(len(spreads))))
    alike = {spreads[rows[0]]: norm_of(rows).square() for rows in buckets(spreads)}
    total = alike.pop(None, torch.zeros((), dtype=torch.float64))
    for mesh, dims in _split_dims(spreads).items():
        copies = {s: prod(mesh.size(d) for d in dims if d not in s.dims) for s in alike if s and s.mesh == mesh}
        squares = torch.stack([alike[s] / n for s, n in copies.items()]).sum()
        for d in dims:
            _all_reduce(squares, mesh.get_group(d), dist.ReduceOp.SUM, "the gradient norm")
        total = squares + total.to(squares.device)
    return total.sqrt()


@torch.no_grad()
def any_over_ranks(flag: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest value that `flag` has on a rank that holds entries of these tensors."""
    for mesh, dims in _split_dims([spread(t) for t in tensors]).items():
        for d in dims:
            _all_reduce(flag, mesh.get_group(d), dist.ReduceOp.MAX, "the flag of a non-finite gradient")
    return flag


def _split_dims(spreads: Sequence[Spread | None]) -> dict[Any, list[int]]:
    """For each mesh the dimensions along which any tensor is split."""
    found: dict[Any, set[int]] = {}
    for s in filter(None, spreads):
        found.setdefault(s.mesh, set()).update(s.dims)
    return {mesh: sorted(dims) for mesh, dims in found.items()}
