"""Lists of tensors: their memory layout, and exact copies of them."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from operator import attrgetter, is_

import torch
from torch import Tensor

from fastsam.kernels.calls import Call

_kind = attrgetter("dtype", "device", "shape")


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether all tensors are dense and element i of memory means the same entry in each of them."""
    first = tensors[0]
    if all(t.is_contiguous() and t.shape == first.shape for t in tensors):
        return True
    return is_dense(first) and all(t.shape == first.shape and t.stride() == first.stride() for t in tensors)


def in_memory_order(tensor: Tensor) -> Tensor:
    """One-dimensional view of a dense tensor's elements as they lie in memory; a gappy one is copied."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.reshape(-1)


def as_words(tensor: Tensor) -> Tensor:
    """One-dimensional view of a dense tensor's memory in words of 4 bytes, or of 1; a gappy tensor as it is.

    The words are called float32 and uint8, as kernels that move bits know them.
    """
    if not is_dense(tensor):
        return tensor
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8 if tensor.numel() else tensor.dtype)
    return flat.view(torch.float32) if len(flat) % 4 == 0 and flat.data_ptr() % 4 == 0 else flat


def buckets(keys: Iterable[Hashable]) -> list[list[int]]:
    """Positions that share a key, in order of first appearance."""
    keys = list(keys)
    # The usual case, and many times faster than to append them one by one.
    if len(set(keys)) == 1:
        return [list(range(len(keys)))]
    found: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return list(found.values())


class Backup:
    """Bit-exact copies of a list of weights, and which of them are complete and not restored yet.

    A copy counts as complete from the moment that all copies are made, before any weight changes, until its weight is
    restored or has taken a step from the copy. Restoring is therefore idempotent, and safe after an exception at any
    moment. A kernel that saves and changes weights in one pass cannot say so in advance: it writes marks of how far it
    came, which are read only if it was cut short.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = list(weights)
        self.tensors = [torch.empty_like(w) for w in weights]
        self._kinds = list(map(_kind, weights))
        self._complete: dict[int, int] = {}
        # Where kernels write their marks: one tensor for each launch.
        self.marks: dict[Hashable, Tensor] = {}
        self._read_marks: Callable[[], list[tuple[Tensor, Tensor]]] | None = None

    @property
    def valid(self) -> bool:
        """Whether any weight still waits to be restored."""
        return bool(self._complete) or self._read_marks is not None

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether this backup was made for exactly these tensors, as they are now."""
        return (
            len(weights) == len(self.weights)
            and all(map(is_, weights, self.weights))
            and list(map(_kind, weights)) == self._kinds
        )

    def begin(self, read_marks: Callable[[], list[tuple[Tensor, Tensor]]]) -> None:
        """Announce a kernel that saves and changes weights in one pass; `mark_complete` follows its launch.

        Args:
            read_marks: returns the stretches of weights whose copies the kernel has completed, beside these copies.
        """
        self._read_marks = read_marks

    def mark_complete(self, positions: Iterable[int] | None = None) -> None:
        """Declare the copies of the weights at these positions complete; None means all."""
        if positions is not None:
            self._complete = self._complete | {id(self.weights[i]): i for i in positions}
            return
        self._complete = {id(w): i for i, w in enumerate(self.weights)}
        self._read_marks = None

    def discard(self, weights: Sequence[Tensor] | None = None) -> None:
        """Declare the copies of these weights no longer needed; None means all."""
        done = set(self._complete if weights is None else map(id, weights))
        # One assignment, so that an interrupt finds all of them discarded or none.
        self._complete = {key: i for key, i in self._complete.items() if key not in done}
        if weights is None:
            self._read_marks = None

    def of(self, weight: Tensor) -> Tensor:
        """Return the true value of `weight`: its copy while that is complete, else the weight itself."""
        position = self._complete.get(id(weight))
        return weight if position is None else self.tensors[position]

    def discard_call(self) -> Call:
        """Return the call that does what `discard()` does."""
        return partial(vars(self).update, {"_complete": {}, "_read_marks": None})

    def pending(self, but: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights that wait to be restored, or stretches of them, and their copies.

        Args:
            but: weights to leave out.
        """
        others = set(map(id, but))
        pairs = [(self.weights[i], self.tensors[i]) for key, i in self._complete.items() if key not in others]
        if self._read_marks is not None:
            pairs += self._read_marks()
        return [weight for weight, _ in pairs], [copy for _, copy in pairs]

    def part(self, positions: Sequence[int]) -> "Backup":
        """Return a backup of the weights at these positions alone, which shares the copies and what is complete."""
        return _Part(self, positions)


class _Part(Backup):
    def __init__(self, whole: Backup, positions: Sequence[int]) -> None:
        self.tensors = [whole.tensors[i] for i in positions]
        self._whole, self._positions = whole, positions

    def mark_complete(self, positions: Iterable[int] | None = None) -> None:
        assert positions is None
        self._whole.mark_complete(self._positions)
