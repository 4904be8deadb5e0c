"""Batches: tensors, or nested dicts, lists and tuples of them, with one leading size."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def tensors_of(batch: Any, scalars: bool = False) -> Iterator[Tensor]:
    """Yield the tensors of a nested batch that have a leading dimension; all else passes through untouched.

    Args:
        batch: tensors, or nested dicts, lists and tuples of them.
        scalars: yield 0-dim tensors too.
    """
    if isinstance(batch, Tensor):
        if scalars or batch.dim() > 0:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value, scalars)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_of(value, scalars)


def batch_size(batch: tuple[Any, ...]) -> int:
    """Return the leading size n that all tensors of the batch share.

    Raises:
        TypeError: the batch holds no tensor.
        ValueError: leading sizes differ, or are 0.
    """
    sizes = [t.shape[0] for t in tensors_of(batch)]
    if not sizes:
        kinds = ", ".join(type(item).__name__ for item in batch)
        raise TypeError(f"the batch holds no tensor with a leading dimension, only {kinds}; pass tensors")
    if len(set(sizes)) > 1:
        raise ValueError(f"batch tensors have different leading sizes {sizes}; every tensor needs one row per sample")
    if sizes[0] == 0:
        raise ValueError("the batch is empty (leading size 0); skip it")
    return sizes[0]


def take_rows(batch: Any, rows: Tensor) -> Any:
    """Return a nested batch of the same structure with the rows at these indices; all else passes through.

    Args:
        batch: tensors, or nested dicts, lists and tuples of them, of one leading size.
        rows: int64 indices of shape [k], on any device.
    """
    return _on_tensors(batch, lambda tensor: tensor.index_select(0, rows.to(tensor.device)))


def split_rows(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Return nested batches of the same structure with `sizes[i]` rows each, views in order; all else passes through.

    Args:
        batch: tensors, or nested dicts, lists and tuples of them, of one leading size, the sum of `sizes`.
        sizes: the numbers of rows.
    """
    ends = zip(accumulate(sizes), sizes, strict=True)
    return [_on_tensors(batch, partial(Tensor.narrow, dim=0, start=end - n, length=n)) for end, n in ends]


def replace_tensors(batch: Any, tensors: Iterable[Tensor], scalars: bool = False) -> Any:
    """Return a nested batch of the same structure with these in place of what `tensors_of` yields, in its order."""
    replacements = iter(tensors)
    return _on_tensors(batch, lambda _: next(replacements), scalars)


def _on_tensors(batch: Any, cut: Callable[[Tensor], Tensor], scalars: bool = False) -> Any:
    """Return a nested batch of the same structure, with `cut` applied to the tensors of `tensors_of`."""
    if isinstance(batch, Tensor):
        return cut(batch) if scalars or batch.dim() > 0 else batch
    inner = partial(_on_tensors, cut=cut, scalars=scalars)
    if isinstance(batch, Mapping):
        return type(batch)({key: inner(value) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(inner, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(inner, batch))
    return batch


def check_losses(losses: Any, n: int, needs_grad: bool = True) -> Tensor:
    """Return `losses` if it is a tensor of n per-sample losses with a gradient, else raise what is wrong with it.

    Raises:
        TypeError: `losses` is something else than n losses.
        RuntimeError: `losses` has no gradient, but `needs_grad`.
    """
    remedy = f"it must return per-sample losses of shape [{n}] without calling backward, e.g. with reduction='none'"
    if not isinstance(losses, torch.Tensor):
        raise TypeError(f"the loss function returned {type(losses).__name__}; {remedy}")
    if losses.shape != (n,):
        what = "a scalar" if losses.dim() == 0 else f"a tensor of shape {list(losses.shape)}"
        raise TypeError(f"the loss function returned {what}; {remedy}")
    if needs_grad and not losses.requires_grad:
        raise RuntimeError("the losses have no gradient; compute them from the model outside torch.no_grad()")
    return losses
