"""Weights in shards, the DTensors of FSDP2 and tensor parallelism: what one rank holds of them, and sums over ranks."""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam.kernels.tensor_list import buckets


def loaded(module: str, name: str) -> Any:
    """A class for isinstance, if its module is loaded: importing DTensor takes longer than all of fastsam."""
    return getattr(sys.modules.get(module), name, ())


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a DTensor. Every step asks it of every tensor, several times: plain ones answer at once."""
    return type(tensor) not in _PLAIN and isinstance(tensor, loaded("torch.distributed.tensor", "DTensor"))


_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))


def are_plain(tensors: Iterable[Any]) -> bool:
    """Whether none of these is a DTensor or may be one, by one look at their types."""
    return _PLAIN.issuperset(map(type, tensors))


def local(tensor: Any) -> Tensor:
    """This rank's own entries of a DTensor, in its memory; any other tensor as it is."""
    # to_local() of a parameter is another tensor in every call, but a backup knows its weights by identity
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def locals_of(tensors: list[Any]) -> list[Any]:
    """This rank's own entries of each, as `local` gives them; None stays None."""
    return tensors if are_plain(tensors) else [local(t) for t in tensors]


def laid_out_as(param: Any, grad: Any) -> Tensor:
    """A DTensor gradient spread as its parameter is, its parts summed; any other gradient as it is."""
    if not is_dtensor(grad) or grad.placements == param.placements:
        return grad
    with torch.no_grad():
        return grad.redistribute(placements=param.placements)


class Placement(NamedTuple):
    """How a tensor lies on several ranks: split along these dimensions of the mesh, copied along the others."""

    mesh: Any
    dims: tuple[int, ...]


def placement(tensor: Any) -> Placement | None:
    """Return how a DTensor lies on the ranks; None for any other tensor."""
    if not is_dtensor(tensor):
        return None
    # the strided shards of two-dimensional meshes do not call themselves shards
    return Placement(tensor.device_mesh, tuple(d for d, p in enumerate(tensor.placements) if not p.is_replicate()))


def first_element(tensor: Any) -> int | None:
    """Which element of the whole tensor, in memory order, this rank's first one is; None where that does not say all.

    Shards of whole rows, as fully_shard makes them, are one stretch of a contiguous tensor. Shards of columns are not,
    nor may those be that torch calls strided, of weights that are both tensor parallel and fully sharded. A complex
    number counts as two elements.
    """
    if not is_dtensor(tensor) or all(p.is_replicate() for p in tensor.placements):
        return 0
    if not tensor.is_contiguous() or not all(p.is_replicate() or p.is_shard(0) for p in tensor.placements):
        return None
    row_length = prod(tensor.shape[1:]) * (2 if tensor.is_complex() else 1)
    return _first_row(tensor.shape, tensor.device_mesh, tensor.placements) * row_length


@lru_cache(1024)
def _first_row(shape: torch.Size, mesh: Any, placements: Any) -> int:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)[1][0]


def shard_number(placement: Placement | None) -> int:
    """Which of a tensor's shards this rank holds, counted along the mesh; 0 for a whole one."""
    number = 0
    for d in placement.dims if placement else ():
        number = number * placement.mesh.size(d) + placement.mesh.get_local_rank(d)  # type: ignore[union-attr]
    return number


@torch.no_grad()
def sum_over_ranks(sum_of: Callable[[list[int]], Tensor], placements: Sequence[Placement | None]) -> Tensor:
    """Return a sum over all entries of a list of tensors, each entry counted once however many ranks hold it.

    Args:
        sum_of: returns the sum over this rank's own entries of the tensors at these positions, 0-dim float64.
        placements: how each tensor lies on the ranks; at least one is on several.
    """
    alike = {placements[rows[0]]: sum_of(rows) for rows in buckets(placements)}
    whole = alike.pop(None, None)
    totals = [] if whole is None else [whole]
    for mesh, dims in _split_dims(placements).items():
        copies = {s: prod(mesh.size(d) for d in dims if d not in s.dims) for s in alike if s and s.mesh == mesh}
        total = torch.stack([alike[s] / n for s, n in copies.items()]).sum()
        for d in dims:
            all_reduce(total, mesh.get_group(d), dist.ReduceOp.SUM, "the gradient norm")
        totals.append(total)
    return torch.stack([total.to(totals[0].device) for total in totals]).sum()


@torch.no_grad()
def any_over_ranks(flag: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest value that `flag` has on a rank that holds entries of these tensors."""
    if are_plain(tensors):
        return flag
    for mesh, dims in _split_dims([placement(t) for t in tensors]).items():
        for d in dims:
            all_reduce(flag, mesh.get_group(d), dist.ReduceOp.MAX, "the flag of a non-finite gradient")
    return flag


@torch.no_grad()
def largest_over_ranks(values: Tensor, tensors: Sequence[Any], what: str) -> None:
    """Replace each value by the largest that a rank has of those which hold entries or copies of these DTensors.

    Args:
        values: of shape [k].
        tensors: DTensors, and others.
        what: the values are, for an error.
    """
    for mesh in dict.fromkeys(t.device_mesh for t in tensors if is_dtensor(t)):
        for d in range(mesh.ndim):
            all_reduce(values, mesh.get_group(d), dist.ReduceOp.MAX, what)


def _split_dims(placements: Sequence[Placement | None]) -> dict[Any, list[int]]:
    """For each mesh the dimensions along which any tensor is split."""
    found: dict[Any, set[int]] = {}
    for s in filter(None, placements):
        found.setdefault(s.mesh, set()).update(s.dims)
    return {mesh: sorted(dims) for mesh, dims in found.items()}


def all_reduce(tensor: Tensor, group: Any, op: Any, what: str) -> None:
    """Reduce `tensor` in place within `group`, or raise RuntimeError that says what it was and on which rank."""
    try:
        dist.all_reduce(tensor, op, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"fastsam could not reduce {what} on rank {dist.get_rank()}: another rank has stopped or waits elsewhere; "
            "its own output says why"
        ) from error
