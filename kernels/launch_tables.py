"""Lists of tensors as the Triton kernels see them: a table of rows, and programs that each take one chunk of a row.

A row describes one parameter: how many elements it has, which hyperparameters it uses, and where its tensors lie. One
launch serves every parameter of a dtype combination, whatever the groups; a program looks up its chunk, then the row.
A parameter shorter than a chunk is one program, whose lanes past the end ask for no memory: two thirds of the tensors
of a ResNet or ViT cost under 1 % of the programs that way, less than any denser packing would spend on more look-ups.

Tables are uploaded when a pointer, a length or a dtype changes, and hyperparameters when their values do, so a
schedule that moves lr leaves the pointers alone. Uploads go through pinned memory, which torch's caching allocator
hands out again only when the copy out of it is done: nothing waits. Memory is reused in the order of one stream, so
every stream has tables of its own.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels import replay_tables
from fastsam.kernels.calls import Call
from fastsam.kernels.tensor_list import buckets, same_layout

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors; settled when they are imported."""
ELEMENTS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""The dtypes the kernels know."""
_REMEMBERED = 128
"""How many tables of each kind are kept."""

uploads: Counter[str] = Counter()
"""How often tables of each kind were built and uploaded: "rows", "chunks", "hyperparameters"."""

Hyperparameters = tuple[tuple[int, ...] | None, replay_tables.Lines]
"""For each parameter which set of hyperparameters it uses, None meaning the first, and the sets."""


class Work(NamedTuple):
    """What a kernel is told in one launch, beside where its tensors lie."""

    constants: dict[str, Any]
    """What it is compiled for; among that BLOCK_SIZE, the elements of a chunk."""
    arguments: tuple[Any, ...] = ()
    """Its last arguments; a 0-dim tensor may lie on another device."""
    hyperparameters: Hyperparameters | None = None
    """None for a kernel that has none."""
    refresh: Callable[[], replay_tables.Lines] | None = None
    """In a capture, returns a set for each parameter, then and before each replay; outside None."""
    columns: tuple[tuple[int, ...], ...] = ()
    """Further integers of each parameter, behind the addresses of its tensors."""
    n_counters: int = 0
    """How many int64 zeros it is lent, which it leaves as zeros."""


class Table(NamedTuple):
    """What a kernel needs to find its work, in the order of its first arguments."""

    rows: Tensor
    """int64: number of elements, index of the hyperparameters, addresses and other integers of each parameter."""
    chunks: Tensor
    """int32 pairs: which row a program works on, and which of its chunks."""
    hyperparameters: Tensor | None
    """float64: one line for each distinct set."""

    def arguments(self) -> tuple[Any, ...]:
        """Return what a kernel is given, which may have no hyperparameters."""
        return self[:2] if self.hyperparameters is None else self


class Launch:
    """The parameters that one launch serves: positions, lengths, and which lists there are, of which dtypes."""

    def __init__(
        self, positions: list[int], lists: Sequence[Sequence[Tensor | None]], addresses: Sequence[tuple[int, ...]]
    ) -> None:
        self.positions = tuple(positions)
        firsts = [tensors[positions[0]] for tensors in lists]
        assert firsts[0] is not None
        self.device = firsts[0].device
        self.present = [first is not None for first in firsts]
        self.dtypes = [firsts[0].dtype if first is None else first.dtype for first in firsts]
        self.lengths = self.of(list(map(_length, lists[0])))
        self._addresses = [self.of(column) for column in addresses]
        self._tables: dict[Hashable, Tensor] = {}
        self._n_programs: dict[int, int] = {}

    def of(self, items: Sequence[Any]) -> tuple[Any, ...]:
        """Return the items at this launch's positions."""
        return tuple(items) if len(items) == len(self.positions) else tuple(items[i] for i in self.positions)

    def n_programs(self, size: int) -> int:
        """Return how many chunks of `size` elements all parameters make."""
        n = self._n_programs.get(size)
        if n is None:
            n = self._n_programs[size] = sum(-(-length // size) for length in self.lengths)
        return n

    def table(self, work: Work) -> Table:
        """Return the table for this work, uploading what has changed."""
        sets, lines = work.hyperparameters or (None, None)
        if work.refresh is not None:
            # Sets that are alike now may differ in a later replay.
            sets = tuple(range(len(self.positions)))
        stream = _stream(self.device)
        key = stream, sets, work.columns
        rows = self._tables.get(key)
        if rows is None:
            columns = self.lengths, sets or (0,) * len(self.positions), *self._addresses, *work.columns
            rows = _upload("rows", torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64), self.device)
            _remember(self._tables, key, rows)
        hyperparameters: Tensor | None
        if work.refresh is not None:
            hyperparameters = _live(work.refresh, self.device)
        else:
            hyperparameters = None if lines is None else _hyperparameter_rows(lines, self.device, stream)
        chunks = _chunk_map(self.lengths, work.constants["BLOCK_SIZE"], self.device, stream)
        table = Table(rows, chunks, hyperparameters)
        replay_tables.hold(*table.arguments())
        return table


_splits: dict[Hashable, tuple[list[Launch], list[int]]] = {}
_kinds: dict[Hashable, tuple[list[list[int]], list[int]]] = {}


def split(
    *lists: Sequence[Tensor | None], by_width: bool = False, refused: tuple[bool, ...] = ()
) -> tuple[list[Launch], list[int]]:
    """Return the launches, one for every device and combination of dtypes, and what is left to the reference.

    Looking at every tensor takes far longer than a launch, so what was found is remembered: the launches while the
    addresses are the same, who goes with whom while lengths, devices, dtypes and layouts are.

    Args:
        lists: the tensors of each parameter that a kernel walks side by side, of one shape and on one device; None
            only behind the first list.
        by_width: whether dtypes of one width are alike, as for a kernel that moves bits.
        refused: for each position whether to leave it to the reference in any case.
    """
    lengths, devices = tuple(map(_length, lists[0])), tuple(map(_device, lists[0]))
    addresses, layouts = zip(*map(_signature, lists), strict=True)
    kind = by_width, refused, lengths, devices, layouts
    found = _splits.get((kind, addresses))
    if found is None:
        alike, rest = _kinds.get(kind) or _remember(_kinds, kind, _find_kinds(lists, by_width, refused))
        launches = [Launch(positions, lists, addresses) for positions in alike]
        found = _remember(_splits, (kind, addresses), (launches, rest))
    return found


def _remember(store: dict[Hashable, Any], key: Hashable, value: Any) -> Any:
    # All are dropped, not the oldest alone: keeping an order would hash the key twice in every step.
    if len(store) >= _REMEMBERED:
        store.clear()
    store[key] = value
    return value


_length: Any = Tensor.numel
_device: Any = Tensor.get_device
_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


def _signature(tensors: Sequence[Any]) -> tuple[tuple[int, ...], Hashable]:
    """Addresses, and what says how the tensors lie there, gathered as fast as Python can."""
    try:
        addresses, dtypes = tuple(map(Tensor.data_ptr, tensors)), tuple(map(_dtype, tensors))
    except TypeError:
        # There is a None among them, which is too rare to look for in every step.
        layouts = [None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors]
        return tuple([0 if t is None else t.data_ptr() for t in tensors]), tuple(layouts)
    if all(map(Tensor.is_contiguous, tensors)):
        return addresses, dtypes
    return addresses, (dtypes, tuple(map(_shape, tensors)), tuple([t.stride() for t in tensors]))


def _find_kinds(
    lists: Sequence[Sequence[Tensor | None]], by_width: bool, refused: tuple[bool, ...]
) -> tuple[list[list[int]], list[int]]:
    keys: list[Any] = []
    for i, row in enumerate(zip(*lists, strict=True)):
        present = [t for t in row if t is not None]
        kinds = (None if t is None else t.dtype.itemsize if by_width else t.dtype for t in row)
        key = present[0].device, *kinds
        keys.append(key if runs_here(*present) and not (refused and refused[i]) else None)
    rest = [i for i, key in enumerate(keys) if key is None]
    return [positions for positions in buckets(keys) if keys[positions[0]] is not None], rest


def runs_here(*tensors: Tensor) -> bool:
    """Whether the kernels can walk these tensors of one parameter side by side, in memory order."""
    device = "cpu" if INTERPRETED else "cuda"
    known = all(t.device.type == device and t.device == tensors[0].device and t.dtype in ELEMENTS for t in tensors)
    return known and same_layout(tensors)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _upload(kind: str, host: Tensor, device: torch.device) -> Tensor:
    uploads[kind] += 1
    if (tables := replay_tables.tables()) is not None:
        return tables.upload(host, device)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _live(lines: Callable[[], replay_tables.Lines], device: torch.device) -> Tensor:
    tables = replay_tables.tables()
    assert tables is not None
    return tables.live(lines, device)


@lru_cache(_REMEMBERED)
def _hyperparameter_rows(sets: tuple[tuple[float, ...], ...], device: torch.device, stream: int) -> Tensor:
    return _upload("hyperparameters", torch.tensor(sets, dtype=torch.float64), device)


def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return these numbers as a float64 tensor on the device, uploaded when they are new."""
    stream = _stream(device)
    lines = _hyperparameter_rows((values,), device, stream)
    replay_tables.hold(lines)
    return lines[0]


@lru_cache(_REMEMBERED)
def _chunk_map(lengths: tuple[int, ...], size: int, device: torch.device, stream: int) -> Tensor:
    return _upload("chunks", torch.from_numpy(chunks_of(lengths, size)), device)


def chunks_of(lengths: Sequence[int], size: int) -> np.ndarray:
    """Pairs (row, chunk of the row) that cover all lengths in chunks of `size`; an empty row has none."""
    counts = -(-np.asarray(lengths, dtype=np.int64) // size)
    rows = np.repeat(np.arange(len(counts)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack((rows, np.arange(len(rows)) - firsts), axis=1).astype(np.int32)


def forget() -> None:
    """Drop all tables: those of a capture that failed were never filled."""
    _splits.clear()
    _hyperparameter_rows.cache_clear()
    _chunk_map.cache_clear()
    _counters.clear()


def distinct(lines: Sequence[tuple[float, ...]]) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    """Return for each line which of the distinct ones it is, and the distinct ones."""
    found: dict[tuple[float, ...], int] = {}
    return tuple(found.setdefault(line, len(found)) for line in lines), tuple(found)


_counters: dict[tuple[torch.device, int, int], list[Tensor]] = {}


def lend_counters(n: int, device: torch.device) -> tuple[Tensor, Call]:
    """Lend `n` int64 zeros to a launch that leaves them as zeros; filling them once spares a launch every step.

    Returns:
        The zeros, and the call that gives them back after the launch. Counters that a launch which failed may have left
        half-way are not used again.
    """
    key = device, _stream(device), n
    free = _counters.setdefault(key, [])
    lent = free.pop() if free else torch.zeros(n, dtype=torch.int64, device=device)
    replay_tables.hold(lent)
    return lent, partial(free.append, lent)
