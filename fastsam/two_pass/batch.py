"""Batches: what is cut with the rows, and what is not.

A batch is the arguments of a loss function. In them, at any depth of mappings, sequences, named tuples and dataclasses:

    tensors and NumPy arrays with a leading dimension       have n rows, and are cut
    a sequence of n entries (texts, lengths, pictures)      has one for each row, and is cut
    a sequence whose entries are cut one by one             is a container: a list of tensors with n rows each
    numbers, texts, None, functions, modules                are the same for all rows
    what `whole` marks                                      likewise
    all else                                                is refused

n is the leading size of the tensors and arrays that lie in no sequence; where there are none, that of those in
sequences; and where these differ or there are none, the length of the outermost sequences. A sequence of n tensors with
n rows each could be either kind, and is refused where n is known from elsewhere.
"""

import enum
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsam.two_pass import capture
from fastsam.two_pass.containers import can_be_rebuilt, is_sequence, labels, parts, rebuild

WAYS_OUT = (
    "mark what is not per sample as fastsam.whole(x), or take the step with opt.step(closure), or opt.ascent() and "
    "opt.descent(), which cut nothing"
)
_SETTINGS = (torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, enum.Enum)
_SAME_FOR_ALL = (numbers.Number, str, bytes, type(None), np.generic, nn.Module, *_SETTINGS)


class Whole:
    """What `whole` returns: `value` is what the loss function gets."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _PerSample:
    """A sequence with one entry for each row."""

    __slots__ = ("entries",)

    def __init__(self, entries: Sequence[Any]) -> None:
        self.entries = entries


def whole(x: Any) -> Any:
    """Mark an argument of a loss function, or a part of one, as not per sample.

    In `opt.step(losses, x, fastsam.whole(edges))` the loss function gets `edges` itself in every pass, uncut, however
    many rows `x` is cut into. Whatever has a leading size other than the batch's n, or is of a class that cannot be
    cut, needs the mark; numbers, texts, None, functions and modules do not.

    Args:
        x: anything: a tensor, a list, a graph, ...

    Returns:
        A mark around it, for `step` and `graph_step` alone.
    """
    return x if isinstance(x, Whole) else Whole(x)


class Batch(tuple):
    """The arguments of a loss function once they are read: n rows, and marks on what cuts differently than it looks.

    `n` is the number of rows. `is_plain` is whether all arguments are tensors with n rows, so that the loss function
    takes them as they are.
    """

    n: int
    is_plain: bool

    def guarded(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of this batch, or a part of it, that calls the loss function without the marks.

        Containers are new in every call, so that what a loss function takes out of a dict is there in the next pass.
        It raises RuntimeError, before the loss function runs, if a tensor of the batch has been changed in place.
        """
        tensors = list(self) if self.is_plain else list(tensors_of(self, every=True))
        versions = _versions(tensors)

        def call(*batch: Any) -> Any:
            if _versions(tensors) != versions:
                self._refuse_changed(tensors, versions)
            return loss_fn(*(batch if self.is_plain else map(_unmarked, batch)))

        return call

    def _refuse_changed(self, tensors: list[Tensor], versions: list[int | None]) -> None:
        now = zip(tensors, versions, _versions(tensors), strict=True)
        changed = next(t for t, before, after in now if before != after)
        name = next((name for name, t in _named_tensors(self, "batch") if t is changed), "batch")
        raise RuntimeError(
            f"the loss function changed {name}, a tensor of shape {list(changed.shape)}, in place, so that the next "
            "forward of the step would see another batch. Compute a new tensor instead (x = x - mean rather than "
            "x.sub_(mean)), or change a copy (x = x.clone()). The weights are as before the step"
        )


def _versions(tensors: list[Tensor]) -> list[int | None]:
    return [None if t.is_inference() else t._version for t in tensors]


# reading a batch


NO_BATCH = Batch()
"""Of a loss function without arguments."""
NO_BATCH.n, NO_BATCH.is_plain = 0, True


def read_batch(batch: tuple[Any, ...]) -> Batch:
    """Find out how many rows a batch has, and how each part of it is cut.

    Raises:
        TypeError: something cannot be cut, or nothing has rows.
        ValueError: leading sizes or lengths differ, or are 0, or a sequence could be read in two ways.
    """
    if isinstance(batch, Batch):
        return batch
    is_plain = len(batch) > 0 and all(map(_is_plain, batch))
    sizes, sure = ([t.shape[0] for t in batch], True) if is_plain else _sizes(batch)
    if len(set(sizes)) > 1:
        raise ValueError(
            f"batch tensors have different leading sizes {sizes}; every tensor needs one row per sample: {WAYS_OUT}"
        )
    n = sizes[0]
    if n == 0:
        raise ValueError("the batch is empty (leading size 0); skip it")
    if is_plain:
        return _batch(batch, n, True)
    return _batch([_mark(part, f"batch[{i}]", n, sure) for i, part in enumerate(batch)], n, False)


def batch_size(batch: tuple[Any, ...]) -> int:
    """Return the number of rows n of a batch; raises what `read_batch` does."""
    return read_batch(batch).n


def _batch(arguments: Iterable[Any], n: int, is_plain: bool) -> Batch:
    batch = Batch(arguments)
    batch.n, batch.is_plain = n, is_plain
    return batch


def _is_plain(part: Any) -> bool:
    return type(part) is Tensor and part.layout is torch.strided and part.dim() > 0 and not part.is_nested


def _sizes(batch: tuple[Any, ...]) -> tuple[list[int], bool]:
    """Return numbers of rows, which should be equal, and whether a list of so many tensors might be one per row."""
    outside = list(_leading_sizes(batch, False))
    if outside:
        return outside, True
    inside = list(_leading_sizes(batch, True))
    if inside and len(set(inside)) == 1:
        return inside, False
    outermost = list(_outermost_sequences(batch))
    lengths = [len(entries) for entries in outermost]
    if lengths and (not inside or (len(set(lengths)) == 1 and all(map(_are_alike, outermost)))):
        return lengths, True
    if inside:
        return inside, True
    kinds = ", ".join(type(item).__name__ for item in batch)
    raise TypeError(f"the batch holds no tensor with a leading dimension, only {kinds}; pass tensors: {WAYS_OUT}")


def _leading_sizes(node: Any, in_sequences: bool) -> Iterator[int]:
    if (size := _rows(node)) is not None:
        yield size
        return
    # the arguments themselves are a tuple, too
    for part in parts(node) or ():
        if in_sequences or not is_sequence(part):
            yield from _leading_sizes(part, in_sequences)


def _outermost_sequences(node: Any) -> Iterator[Sequence[Any]]:
    for part in parts(node) or ():
        if is_sequence(part) and len(part):
            yield part
        elif not is_sequence(part):
            yield from _outermost_sequences(part)


def _rows(node: Any) -> int | None:
    """Return the leading size of something that is cut by itself; None for containers, and what has no rows."""
    if isinstance(node, Tensor):
        return node.size(0) if node.dim() else None
    if isinstance(node, np.ndarray):
        return len(node) if node.ndim else None
    return node.batch_size[0] if _has_batch_size(node) and node.batch_size else None


def has_own_rows(node: Any) -> bool:
    """Whether it is a tensor, an array or a TensorDict, which are cut by their own indexing."""
    return isinstance(node, (Tensor, np.ndarray)) or _has_batch_size(node)


def _has_batch_size(node: Any) -> bool:
    """Whether it is a TensorDict or the like, which is cut by its own indexing."""
    if isinstance(node, (dict, list, tuple)) or not hasattr(type(node), "__getitem__"):
        return False
    return isinstance(getattr(node, "batch_size", None), torch.Size)


def _mark(node: Any, name: str, n: int, sure: bool) -> Any:
    """Return a part of the batch with `_PerSample` around sequences that have one entry for each row.

    Args:
        node: the part.
        name: of it, for messages.
        n: rows of the batch.
        sure: n is known from elsewhere than the tensors in sequences.
    """
    if isinstance(node, Whole):
        return node
    if (rows := _rows(node)) is not None:
        if isinstance(node, Tensor) and (node.is_nested or node.layout not in (torch.strided, torch.sparse_coo)):
            raise _cannot_cut(node, name, n, f"of layout {node.layout}")
        if rows != n:
            raise ValueError(
                f"{name} and the batch have different leading sizes [{rows}, {n}]; every tensor needs one row per "
                f"sample: {WAYS_OUT}"
            )
        return node
    if isinstance(node, (Tensor, np.ndarray, *_SAME_FOR_ALL)):
        return node
    inner = parts(node)
    if inner is None:
        if callable(node):
            return node
        raise _cannot_cut(node, name, n)
    if not inner:
        return node
    if not can_be_rebuilt(node):
        raise _cannot_cut(node, name, n, "which another one cannot be made of")
    if is_sequence(node):
        is_container = _is_container(inner, n)
        is_per_sample = len(inner) == n and _are_alike(inner)
        if is_per_sample and not is_container:
            return _PerSample(node)
        if is_per_sample and sure and n > 1:
            raise ValueError(
                f"{name} is a {type(node).__name__} of {n} tensors that have {n} rows each, as the batch has: it could "
                "be one tensor for each sample, or tensors of the batch. Pass torch.stack of it, or its entries by "
                f"themselves or in a dict; or {WAYS_OUT}"
            )
        # whichever of its tensors does not fit is named below
        if not is_container and not any(_rows(part) is not None for part in inner):
            raise _cannot_cut(node, name, n, f"of length {len(inner)}")
    marked = [_mark(part, name + at, n, sure) for part, at in zip(inner, labels(node), strict=True)]
    return rebuild(node, marked)


def _is_container(entries: Sequence[Any], n: int) -> bool:
    """Whether the entries of a sequence are cut one by one: each has n rows or none, and a tensor or sequence has n."""
    fits = [_fits(entry, n) for entry in entries]
    # a sequence of containers has one for each sample, where it is as long
    if len(entries) == n > 1 and not any(_rows(entry) is not None for entry in entries):
        return False
    return all(fit is not False for fit in fits) and any(fits)


def _fits(node: Any, n: int) -> bool | None:
    """Whether all in a part of the batch has n rows; None where nothing has rows."""
    if (rows := _rows(node)) is not None:
        return rows == n
    inner = parts(node)
    if (
        isinstance(node, (Whole, Tensor, np.ndarray, *_SAME_FOR_ALL))
        or inner == []
        or (inner is None and callable(node))
    ):
        return None
    if inner is None:
        return False
    if is_sequence(node):
        return len(inner) == n or _is_container(inner, n)
    fits = [_fits(part, n) for part in inner]
    return False if False in fits else (True if True in fits else None)


def _are_alike(entries: Sequence[Any]) -> bool:
    """Whether the tensors in a sequence have one dtype and number of dimensions, as those of several samples have."""
    kinds = {(t.dtype, t.dim()) for t in entries if isinstance(t, Tensor)}
    return len(kinds) <= 1


def _cannot_cut(node: Any, name: str, n: int, what: str = "") -> TypeError:
    kind = f"a {type(node).__name__}" + (f" {what}" if what else "")
    return TypeError(f"{name} is {kind}, which cannot be cut with the {n} rows of the batch: {WAYS_OUT}")


# walking through a batch


def tensors_of(batch: Any, every: bool = False) -> Iterator[Tensor]:
    """Yield the tensors of a batch, or a part of it, that are cut by themselves.

    Args:
        batch: the arguments, or a part of them.
        every: all tensors: 0-dim ones, those of `whole`, and those that are one sample each.
    """
    yield from (t for _, t in _named_tensors(batch, "", every))


def _named_tensors(node: Any, name: str, every: bool = True) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        if every or node.dim() > 0:
            yield name, node
    elif isinstance(node, Whole):
        if every:
            yield from _named_tensors(node.value, name)
    elif isinstance(node, _PerSample):
        if every:
            yield from _named_tensors(node.entries, name)
    elif not isinstance(node, np.ndarray) and (inner := parts(node)):
        for part, at in zip(inner, labels(node), strict=True):
            yield from _named_tensors(part, name + at, every)


def replace_tensors(batch: Any, tensors: Iterable[Tensor], every: bool = False) -> Any:
    """Return a batch of the same structure with these in place of what `tensors_of` yields, in its order."""
    replacements = iter(tensors)

    def replaced(node: Any) -> Any:
        if isinstance(node, Tensor):
            return next(replacements) if every or node.dim() > 0 else node
        if isinstance(node, Whole):
            return Whole(replaced(node.value)) if every else node
        if isinstance(node, _PerSample):
            return _PerSample(replaced(node.entries)) if every else node
        inner = None if isinstance(node, np.ndarray) else parts(node)
        return rebuild(node, list(map(replaced, inner))) if inner else node

    return tuple(map(replaced, batch))


def has_only_tensors(batch: Batch) -> bool:
    """Whether all that is cut is a tensor, so that row numbers on the device suffice."""
    return not any(isinstance(node, (_PerSample, np.ndarray)) or _has_batch_size(node) for node in leaves(batch))


def leaves(node: Any) -> Iterator[Any]:
    """Yield what a batch, or a part of it, holds once all containers are taken apart."""
    inner = None if has_own_rows(node) else parts(node)
    if inner is None:
        yield node
    for part in inner or ():
        yield from leaves(part)


def _unmarked(node: Any) -> Any:
    """Return a part of the batch as the loss function gets it, in new containers."""
    if isinstance(node, Whole):
        return node.value
    if isinstance(node, _PerSample):
        return rebuild(node.entries, list(node.entries))
    inner = None if has_own_rows(node) else parts(node)
    return node if inner is None else rebuild(node, list(map(_unmarked, inner)))


# cutting


def take_rows(batch: tuple[Any, ...], rows: Tensor) -> tuple[Any, ...]:
    """Return the rows of a batch at these indices.

    What is no tensor (sequences with one entry for each row, arrays) is taken by Python, which then waits for the
    indices; a batch of tensors waits for nothing.

    Args:
        batch: the arguments of a loss function.
        rows: int64 indices of shape [k], on any device.

    Raises:
        RuntimeError: while a step is captured, if anything that is cut is no tensor.
    """
    known: list[int] = []

    def on_host() -> list[int]:
        if capture.current() is not None:
            raise RuntimeError(
                "the batch has parts that are no tensors, and which of their rows are taken is known on the device"
            )
        if not known:
            known.extend(rows.tolist())
        return known

    def taken(node: Any) -> Any:
        return node.index_select(0, rows.to(node.device)) if isinstance(node, Tensor) else node[on_host()]

    return _cut(batch, len(rows), taken, on_host)


def split_rows(batch: tuple[Any, ...], sizes: Sequence[int]) -> list[tuple[Any, ...]]:
    """Return batches with `sizes[i]` rows each, in order; their tensors are views.

    Args:
        batch: the arguments of a loss function.
        sizes: the numbers of rows; their sum is n.
    """
    ends = zip(accumulate(sizes), sizes, strict=True)
    return [_cut_span(batch, end - size, size) for end, size in ends]


def _cut_span(batch: tuple[Any, ...], start: int, size: int) -> tuple[Any, ...]:
    span = range(start, start + size)

    def piece(node: Any) -> Any:
        if isinstance(node, Tensor) and node.layout is torch.sparse_coo:
            return node.index_select(0, torch.arange(start, start + size, device=node.device))
        return node.narrow(0, start, size) if isinstance(node, Tensor) else node[start : start + size]

    return _cut(batch, size, piece, lambda: span)


def _cut(
    batch: tuple[Any, ...], n: int, piece: Callable[[Any], Any], positions: Callable[[], Sequence[int]]
) -> tuple[Any, ...]:
    """Return a part of a batch: read like the batch where that is, else as a loss function takes it.

    Args:
        batch: the arguments of a loss function.
        n: rows of the part.
        piece: cuts a tensor, an array or a TensorDict.
        positions: returns the row numbers, for sequences.
    """
    read = read_batch(batch)

    def cut(node: Any) -> Any:
        if isinstance(node, _PerSample):
            return _PerSample(rebuild(node.entries, [node.entries[i] for i in positions()]))
        if _rows(node) is not None:
            return piece(node)
        inner = None if has_own_rows(node) else parts(node)
        return node if inner is None else rebuild(node, list(map(cut, inner)))

    found = _batch(map(cut, read), n, read.is_plain)
    return found if read is batch else tuple(map(_unmarked, found))
