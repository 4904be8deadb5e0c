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
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels import replay_tables
from fastsam.kernels.philox import Draw
from fastsam.kernels.tensor_list import buckets, same_layout

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors; settled when they are imported."""
THREADS = 256
"""Threads of a program, whatever the width of a warp."""
_BYTES_PER_PROGRAM = 8192  # of the widest tensor: two 128-bit accesses a thread keep registers near 40
_INTERPRETED_BLOCK_SIZE = 16384  # there a program costs about the same whatever its size
_REMEMBERED = 128  # tables of each kind

ELEMENTS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""The dtypes the kernels know."""

uploads: Counter[str] = Counter()
"""How often tables of each kind were built and uploaded: "rows", "chunks", "hyperparameters"."""


class Table(NamedTuple):
    """What a kernel needs to find its work, in the order of its arguments."""

    rows: Tensor
    """int64: number of elements, index of the hyperparameters, addresses and other integers of each parameter."""
    chunks: Tensor
    """int32 pairs: which row a program works on, and which of its chunks."""
    hyperparameters: Tensor
    """float64: one line for each distinct set."""

    @property
    def n_programs(self) -> int:
        """Size of the grid."""
        return self.chunks.shape[0]


class Launch:
    """The parameters that one launch serves: their positions, their lengths, and each list's dtype."""

    def __init__(
        self, rows: list[int], lists: Sequence[Sequence[Tensor | None]], addresses: Sequence[tuple[int, ...]]
    ) -> None:
        self.rows = tuple(rows)
        firsts = [tensors[rows[0]] for tensors in lists]
        assert firsts[0] is not None
        self.device = firsts[0].device
        self.dtypes = [firsts[0].dtype if first is None else first.dtype for first in firsts]
        self.lengths = self.of(list(map(_length, lists[0])))
        self._addresses = [self.of(column) for column in addresses]
        self._tables: dict[Hashable, Tensor] = {}

    def of(self, items: Sequence[Any]) -> tuple[Any, ...]:
        """Return the items at this launch's positions."""
        return tuple(items) if len(items) == len(self.rows) else tuple(items[i] for i in self.rows)

    def table(
        self,
        size: int,
        sets: tuple[int, ...] | None = None,
        hyperparameters: tuple[tuple[float, ...], ...] = ((),),
        *others: tuple[int, ...],
        refresh: Callable[[], replay_tables.Lines] | None = None,
    ) -> Table:
        """Return the table for chunks of `size` elements, uploading what has changed.

        Args:
            size: elements of a chunk.
            sets: for each parameter which set of hyperparameters it uses; None means the first.
            hyperparameters: the sets.
            others: further integers of each parameter, in the columns behind the addresses.
            refresh: in a capture, returns a set for each parameter, then and before each replay; outside None.
        """
        if refresh is not None:
            sets = tuple(range(len(self.rows)))  # those that are alike now may differ in a later replay
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        rows = self._tables.get((stream, sets, others))
        if rows is None:
            columns = self.lengths, sets or (0,) * len(self.rows), *self._addresses, *others
            rows = _upload("rows", torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64), self.device)
            _remember(self._tables, (stream, sets, others), rows)
        table = Table(
            rows,
            _chunk_map(self.lengths, size, self.device, stream),
            _live(refresh, self.device) if refresh else _hyperparameter_rows(hyperparameters, self.device, stream),
        )
        replay_tables.keep(*table)
        return table


_splits: dict[Hashable, tuple[list[Launch], list[int]]] = {}
_kinds: dict[Hashable, tuple[list[list[int]], list[int]]] = {}


def split(
    *lists: Sequence[Tensor | None], by_width: bool = False, refused: tuple[bool, ...] = ()
) -> tuple[list[Launch], list[int]]:
    """Return the launches, one for every device and combination of dtypes, and the rows that are left to the reference.

    Looking at every tensor takes far longer than a launch, so what was found is remembered: the launches while the
    addresses are the same, who goes with whom while lengths, devices, dtypes and layouts are.

    Args:
        lists: the tensors of each parameter that a kernel walks side by side, of one shape and on one device; None
            only behind the first list.
        by_width: whether dtypes of one width are alike, as for a kernel that moves bits.
        refused: for each row whether to leave it to the reference in any case.
    """
    lengths, devices = tuple(map(_length, lists[0])), tuple(map(_device, lists[0]))
    addresses, layouts = zip(*map(_signature, lists), strict=True)
    kind = by_width, refused, lengths, devices, layouts
    found = _splits.get((kind, addresses))
    if found is None:
        rows, rest = _kinds.get(kind) or _remember(_kinds, kind, _find_kinds(lists, by_width, refused))
        found = _remember(_splits, (kind, addresses), ([Launch(some, lists, addresses) for some in rows], rest))
    return found


def _remember(store: dict[Hashable, Any], key: Hashable, value: Any) -> Any:
    if len(store) >= _REMEMBERED:  # not the oldest alone: to keep an order would hash the key twice in every step
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
    except TypeError:  # None among them, which is not worth a look at each in every step
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
    return [rows for rows in buckets(keys) if keys[rows[0]] is not None], rest


def runs_here(*tensors: Tensor) -> bool:
    """Whether the kernels can walk these tensors of one parameter side by side, in memory order."""
    device = "cpu" if INTERPRETED else "cuda"
    known = all(t.device.type == device and t.device == tensors[0].device and t.dtype in ELEMENTS for t in tensors)
    return known and same_layout(tensors)


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
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    rows = _hyperparameter_rows((values,), device, stream)
    replay_tables.keep(rows)
    return rows[0]


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


_counters: dict[tuple[torch.device, int, int], Tensor] = {}


@contextmanager
def counters(n: int, device: torch.device) -> Iterator[Tensor]:
    """Lend `n` int64 zeros that the launch inside leaves as zeros; filling them once spares a launch every step."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    lent = _counters.pop((device, stream, n), None)
    if lent is None:
        lent = torch.zeros(n, dtype=torch.int64, device=device)
    replay_tables.keep(lent)
    yield lent
    _counters[device, stream, n] = lent  # not reached, so not reused, where the launch failed half-way


def block_size(*dtypes: torch.dtype, vectors: int = 2) -> int:
    """Elements of a chunk: `vectors` 128-bit accesses for each thread to the widest tensor."""
    if INTERPRETED:
        return _INTERPRETED_BLOCK_SIZE
    return _BYTES_PER_PROGRAM * vectors // 2 // max(dtype.itemsize for dtype in dtypes)


def widest(dtypes: Sequence[torch.dtype]) -> int:
    """Bits of the widest dtype."""
    return 8 * max(dtype.itemsize for dtype in dtypes)


def wide(dtype: torch.dtype) -> Any:
    """What a kernel computes in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def t_of(eta: float | None) -> tuple[float, float]:
    """Two hyperparameters that say what T is: (0, 0) for 1, (1, eta) for |w| + eta."""
    return (0.0, 0.0) if eta is None else (1.0, eta)


def mask_constants(draw: Draw | None) -> dict[str, bool]:
    """Return what a kernel with a random mask is compiled for: whether it is of elements, or of the whole tensor."""
    is_masked = draw is not None and draw.keep is not None
    return {"MASKED": is_masked and not draw.whole, "WHOLE": is_masked and draw.whole}  # type: ignore[union-attr]


def to_device(scalar: Tensor | None, device: torch.device, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return a 0-dim tensor on `device` without waiting for it; None stays None."""
    return None if scalar is None else scalar.to(device, dtype, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager:
    """Context in which a launch goes to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(
    kernel: Any, n_programs: int, *args: Any, threads: int = THREADS, enable_fp_fusion: bool = True, **constants: Any
) -> None:
    """Run `n_programs` programs of a kernel on the current device; none where there is nothing to do.

    Args:
        kernel: a jit function.
        n_programs: size of the grid.
        args: the kernel's arguments.
        threads: of a program.
        enable_fp_fusion: whether a product and a sum may become one operation with one rounding.
        constants: what the kernel is compiled for.
    """
    if n_programs:
        num_warps = max(1, threads // (64 if torch.version.hip else 32))
        kernel[(n_programs,)](*args, num_warps=num_warps, enable_fp_fusion=enable_fp_fusion, **constants)
