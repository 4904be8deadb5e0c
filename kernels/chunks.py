"""Lists of tensors as the Triton kernels see them: a table of rows, and programs that each take one chunk of a row.

A row describes one parameter: how many elements it has, which hyperparameters it uses, and where its tensors lie. One
launch serves every parameter of a dtype combination, whatever the groups; a program looks up its chunk, then the row.
A parameter shorter than a chunk is one program, whose lanes past the end ask for no memory: two thirds of the tensors
of a ResNet or ViT cost under 1 % of the programs that way, less than any denser packing would spend on more look-ups.

Tables are uploaded when a pointer, a length or a dtype changes, and hyperparameters when their values do, so a
schedule that moves lr leaves the pointers alone. Uploads go through pinned memory, which torch's caching allocator
hands out again only when the copy out of it is done: nothing waits.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels.tensor_list import buckets, same_layout

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on CPU tensors; settled when they are imported."""
THREADS = 256
"""Threads of a program, whatever the width of a warp."""
_BYTES_PER_PROGRAM = 8192  # of the widest tensor: two 128-bit accesses a thread keep registers near 40
_INTERPRETED_BLOCK_SIZE = 16384  # there a program costs about the same whatever its size
COLUMNS = tl.constexpr(2)
"""Columns of a row before its pointers: number of elements, index of the hyperparameters."""

ELEMENTS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""The dtypes the kernels know."""


def runs_here(*tensors: Tensor) -> bool:
    """Whether the kernels can walk these tensors of one parameter side by side, in memory order."""
    device = "cpu" if INTERPRETED else "cuda"
    return (
        all(t.device.type == device and t.dtype in ELEMENTS and t.device == tensors[0].device for t in tensors)
        and same_layout(tensors)
    )  # fmt: skip


def take(items: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """Return the items at these positions."""
    return [items[i] for i in rows]


def split(
    *lists: Sequence[Tensor | None],
    by: Callable[[Tensor], Any] = lambda t: t.dtype,
    unless: Callable[[int], bool] = lambda i: False,
) -> tuple[list[list[int]], list[int]]:
    """Return the rows of each launch, one for every device and combination of dtypes, and the rows left to the twin.

    Args:
        lists: the tensors of each parameter that a kernel walks side by side.
        by: what about a tensor a kernel is compiled for.
        unless: which rows to leave to the twin in any case.
    """
    keys: list[Any] = []
    for i, row in enumerate(zip(*lists, strict=True)):
        present = [t for t in row if t is not None]
        key = present[0].device, *(None if t is None else by(t) for t in row)
        keys.append(None if unless(i) or not runs_here(*present) else key)
    found = buckets(keys)
    return [rows for rows in found if keys[rows[0]] is not None], [i for i, key in enumerate(keys) if key is None]


def wide(dtype: torch.dtype) -> Any:
    """What a kernel computes in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def t_of(eta: float | None) -> tuple[float, float]:
    """Two hyperparameters that say what T is: (0, 0) for 1, (1, eta) for |w| + eta."""
    return (0.0, 0.0) if eta is None else (1.0, eta)


def block_size(*dtypes: torch.dtype, vectors: int = 2) -> int:
    """Elements of a chunk: `vectors` 128-bit accesses for each thread to the widest tensor."""
    if INTERPRETED:
        return _INTERPRETED_BLOCK_SIZE
    return _BYTES_PER_PROGRAM * vectors // 2 // max(dtype.itemsize for dtype in dtypes)


def on_device(device: torch.device) -> AbstractContextManager:
    """Context in which a launch goes to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def address(tensor: Tensor | None) -> int:
    """Where the tensor's data lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def to_device(scalar: Tensor | None, device: torch.device, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return a 0-dim tensor on `device` without waiting for it; None stays None."""
    return None if scalar is None else scalar.to(device, dtype, non_blocking=True)


class Table(NamedTuple):
    """What a launch needs to find its work."""

    rows: Tensor
    """int64: the columns of each parameter."""
    chunks: Tensor
    """int32 pairs: which row a program works on, and which of its chunks."""
    hyperparameters: Tensor
    """float64: one line for each distinct set."""

    @property
    def n_programs(self) -> int:
        """Size of the grid."""
        return self.chunks.shape[0]


def table(
    lengths: Sequence[int],
    columns: Sequence[Sequence[int]],
    hyperparameters: Sequence[tuple[float, ...]],
    size: int,
    device: torch.device,
) -> Table:
    """Return the table of a list of parameters, uploading what has changed.

    Args:
        lengths: number of elements of each parameter.
        columns: for each column its integers, one for each parameter: addresses of tensors, and others.
        hyperparameters: of each parameter; groups may differ.
        size: elements of a chunk.
        device: where the tensors are.
    """
    # memory is reused in the order of one stream, so every stream has its own tables
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    distinct: dict[tuple[float, ...], int] = {}
    sets = [distinct.setdefault(h, len(distinct)) for h in hyperparameters]
    return Table(
        pointer_rows(tuple(zip(lengths, sets, *columns, strict=True)), device, stream),
        chunk_map(tuple(lengths), size, device, stream),
        hyperparameter_rows(tuple(distinct), device, stream),
    )


def _upload(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@lru_cache(maxsize=128)
def pointer_rows(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Upload the rows; `cache_info().misses` counts how often."""
    return _upload(torch.tensor(rows, dtype=torch.int64), device)


@lru_cache(maxsize=128)
def hyperparameter_rows(sets: tuple[tuple[float, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Upload the distinct sets of hyperparameters; `cache_info().misses` counts how often."""
    return _upload(torch.tensor(sets, dtype=torch.float64), device)


@lru_cache(maxsize=128)
def chunk_map(lengths: tuple[int, ...], size: int, device: torch.device, stream: int) -> Tensor:
    """Upload which row and which of its chunks each program takes."""
    return _upload(torch.from_numpy(chunks_of(lengths, size)), device)


def chunks_of(lengths: Sequence[int], size: int) -> np.ndarray:
    """Pairs (row, chunk of the row) that cover all lengths in chunks of `size`; an empty row has none."""
    counts = -(-np.asarray(lengths, dtype=np.int64) // size)
    rows = np.repeat(np.arange(len(counts)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack((rows, np.arange(len(rows)) - firsts), axis=1).astype(np.int32)


_counters: dict[tuple[torch.device, int, int], Tensor] = {}


@contextmanager
def counters(n: int, device: torch.device) -> Iterator[Tensor]:
    """Lend `n` int64 zeros that the launch inside leaves as zeros; filling them once spares a launch every step."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, n)
    lent = _counters.pop(key, None)
    if lent is None:
        lent = torch.zeros(n, dtype=torch.int64, device=device)
    yield lent
    _counters[key] = lent  # not reached, so not reused, where the launch failed half-way


def launch(kernel: Any, n_programs: int, *args: Any, enable_fp_fusion: bool = True, **constants: Any) -> None:
    """Run `n_programs` programs of a kernel on the current device; none where there is nothing to do.

    Args:
        kernel: a jit function.
        n_programs: size of the grid.
        args: the kernel's arguments.
        enable_fp_fusion: whether a product and a sum may become one operation with one rounding.
        constants: what the kernel is compiled for.
    """
    if n_programs:
        num_warps = THREADS // (64 if torch.version.hip else 32)
        kernel[(n_programs,)](*args, num_warps=num_warps, enable_fp_fusion=enable_fp_fusion, **constants)


# the kernels' own side


@triton.jit
def find_chunk(rows_ptr, chunks_ptr, N_COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Look up this program's row, where in it the chunk starts, and how long the chunk is."""
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * BLOCK_SIZE
    row_ptr = rows_ptr + tl.load(chunks_ptr + 2 * program).to(tl.int64) * N_COLUMNS
    length = tl.minimum(tl.load(row_ptr) - start, BLOCK_SIZE).to(tl.int32)
    return row_ptr, start, length


@triton.jit
def aligned_length(length, addresses):
    """How many elements can be taken in 128-bit accesses: none if the bits of any address, or-ed together, forbid."""
    return length // 16 * 16 * ((addresses & 15) == 0).to(tl.int32)


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """Return x in the dtype of arithmetic. Triton's interpreter knows no way from bfloat16 but float32."""
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Return x in the dtype of a tensor; the other way round."""
    if DTYPE.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def element_ptr(base, start, DTYPE: tl.constexpr, WIDEST: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor at the address `base`.

    The hint has to follow the cast. Where one thread's elements fill 128 bits of the widest tensor they fill fewer of
    a narrower one; claiming more would make the two disagree on who holds what, and meet in shared memory.
    """
    ptr = base.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16 * DTYPE.primitive_bitwidth // WIDEST)
    return ptr + start
