"""Exact selection of the rows whose loss rose most, in one launch of one program.

    key = the difference of the losses as an integer of the same order, NaN below all others
    first..last = where the k-th largest key lies; at the start, anywhere
    while first < last, and more than k keys are >= first:
        cut first..last in four; keep the part with the k-th largest key
    take the keys above last, and of those in first..last the lowest rows, until there are k

Four parts halve the passes of a binary search, and three counts travel in one sum, which with few rows is all that a
pass waits for. Up to 16,384 keys, or 8,192 of float64, stay in registers; more are made again in every pass.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels.launch import launch, on_device

MOST_ROWS = 65536
"""One program takes them all, so its time grows with their number."""
# Few, so that a small last batch seldom needs a kernel of its own.
_BLOCK_SIZES = (256, 2048)
# Of keys, in the largest block: 64 bytes a thread.
_BYTES_IN_REGISTERS = 65536
_STORE_SIZE = 2048
_ELEMENTS_PER_THREAD = 8
_MOST_THREADS = 1024
# Bits of a count: three fit an int64.
_FIELD = tl.constexpr(20)
_FIELD_MASK = tl.constexpr(2**20 - 1)


@triton.jit
def _load_keys(after_ptr, before_ptr, after_stride, before_stride, rows, n_rows, KEY: tl.constexpr):
    """Integers in the order of after - before; NaN and rows past the end get the lowest one."""
    BITS: tl.constexpr = KEY.primitive_bitwidth
    COMPUTE: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    LOWEST: tl.constexpr = -(1 << (BITS - 1))
    mask = rows < n_rows
    after = tl.load(after_ptr + rows.to(tl.int64) * after_stride, mask=mask, other=0).to(COMPUTE)
    before = tl.load(before_ptr + rows.to(tl.int64) * before_stride, mask=mask, other=0).to(COMPUTE)
    delta = after - before
    # -0 counts as 0.
    bits = tl.where(delta == 0, 0.0, delta).to(KEY, bitcast=True)
    # A negative number is stored as its magnitude under a sign bit, so the order of magnitudes is turned around.
    keys = tl.where(bits < 0, bits ^ -(LOWEST + 1), bits)
    return tl.where(mask & (delta == delta), keys, LOWEST)


@triton.jit
def _count(keys, first, step):
    """How many keys are >= first + step, first + 2 step and first + 3 step, in three fields."""
    second = first + step
    third = second + step
    fourth = third + step
    fields = (keys >= second).to(tl.int64)
    fields += (keys >= third).to(tl.int64) << _FIELD
    fields += (keys >= fourth).to(tl.int64) << 2 * _FIELD
    return tl.sum(fields)


@triton.jit
def _narrow(first, last, n_from_first, n_above, cut, fields, k):
    """Move one end of first..last to `cut` so that the k-th largest key stays inside; `fields` counts keys >= cut."""
    n_from_cut = (fields & _FIELD_MASK).to(tl.int32)
    rises = n_from_cut >= k
    last = tl.where(rises, last, tl.minimum(last, cut - 1))
    n_above = tl.where(rises, n_above, tl.maximum(n_above, n_from_cut))
    return tl.where(rises, cut, first), last, tl.where(rises, n_from_cut, n_from_first), n_above


@triton.jit
def _store_chosen(keys, rows, first, last, n_chosen, n_spare, chosen_ptr):
    """Append the chosen ones of these rows to n_chosen earlier ones; n_spare in first..last may still be taken."""
    sure = keys > last
    # Rows past the end may be as low as NaN, but come after enough others.
    likely = (keys >= first) & (keys <= last)
    both = sure.to(tl.int32) | (likely.to(tl.int32) << 16)
    earlier = tl.cumsum(both, 0) - both
    n_likely = earlier >> 16
    places = n_chosen + (earlier & 0xFFFF) + tl.minimum(n_likely, n_spare)
    tl.store(chosen_ptr + places, rows.to(tl.int64), mask=sure | (likely & (n_likely < n_spare)))
    total = tl.sum(both)
    taken = tl.minimum(total >> 16, n_spare)
    return n_chosen + (total & 0xFFFF) + taken, n_spare - taken


@triton.jit
def _count_rows(
    after_ptr, before_ptr, after_stride, before_stride, n_rows, first, step,
    KEY: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The same for all rows, block by block."""
    fields = tl.full((), 0, tl.int64)
    start = 0
    while start < n_rows:
        rows = start + tl.arange(0, BLOCK_SIZE)
        keys = _load_keys(after_ptr, before_ptr, after_stride, before_stride, rows, n_rows, KEY)
        fields += _count(keys, first, step)
        start += BLOCK_SIZE
    return fields


@triton.jit
def _search(
    after_ptr, before_ptr, after_stride, before_stride, n_rows, k,
    KEY: tl.constexpr, LOOPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Find first..last, where the k-th largest key lies, so narrow that k keys are >= first or all inside equal.

    Returns both and the number of keys above last.
    """
    BITS: tl.constexpr = KEY.primitive_bitwidth
    first = tl.full((), -(1 << (BITS - 1)), KEY)
    last = tl.full((), (1 << (BITS - 1)) - 1, KEY)
    step = tl.full((), 1 << (BITS - 2), KEY)
    n_from_first = n_rows
    n_above = 0
    if not LOOPS:
        rows = tl.arange(0, BLOCK_SIZE)
        keys = _load_keys(after_ptr, before_ptr, after_stride, before_stride, rows, n_rows, KEY)
    while (first < last) & (n_from_first > k):
        if LOOPS:
            fields = _count_rows(
                after_ptr, before_ptr, after_stride, before_stride, n_rows, first, step, KEY, BLOCK_SIZE
            )
        else:
            fields = _count(keys, first, step)
        cut = first
        for _ in tl.static_range(3):
            cut += step
            first, last, n_from_first, n_above = _narrow(first, last, n_from_first, n_above, cut, fields, k)
            fields >>= _FIELD
        step >>= 2
    return first, last, n_above


@triton.jit(
    do_not_specialize=["after_stride", "before_stride", "n_rows", "k"],
    do_not_specialize_on_alignment=["after_ptr", "before_ptr", "chosen_ptr"],
)
def _select_kernel(
    after_ptr, before_ptr, chosen_ptr, after_stride, before_stride, n_rows, k,
    KEY: tl.constexpr, LOOPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, STORE_SIZE: tl.constexpr,
):  # fmt: skip
    """chosen = the rows of the k largest after - before, ascending.

    Reads both losses twice, with LOOPS in every pass and once more, and all but the first time from a cache: 8 B per
    float32 row. There are at most half as many passes as KEY has bits. Writes 8 B per chosen row.
    """
    first, last, n_above = _search(
        after_ptr, before_ptr, after_stride, before_stride, n_rows, k, KEY, LOOPS, BLOCK_SIZE
    )
    n_chosen = 0
    n_spare = k - n_above
    start = 0
    while start < n_rows:
        rows = start + tl.arange(0, STORE_SIZE)
        keys = _load_keys(after_ptr, before_ptr, after_stride, before_stride, rows, n_rows, KEY)
        n_chosen, n_spare = _store_chosen(keys, rows, first, last, n_chosen, n_spare, chosen_ptr)
        start += STORE_SIZE


def select_largest_increase(after: Tensor, before: Tensor, k: int) -> Tensor:
    """Return the rows of the k largest after - before, ascending; see `ops.select_largest_increase`.

    One launch, whatever the strides.
    """
    n_rows = len(after)
    if n_rows > MOST_ROWS:
        raise ValueError(f"at most {MOST_ROWS} losses, got {n_rows}; split the batch, or call set_backend('torch')")
    chosen = torch.empty(k, dtype=torch.int64, device=after.device)
    with on_device(after.device):
        launch(
            _select_kernel, 1, after, before, chosen, after.stride(0), before.stride(0), n_rows, k,
            **shape_of(n_rows, after.dtype), enable_fp_fusion=False,
        )  # fmt: skip
    return chosen


def shape_of(n_rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the program that serves this many losses of a dtype: four shapes in all."""
    key = tl.int64 if dtype == torch.float64 else tl.int32
    most = _BYTES_IN_REGISTERS // key.itemsize
    size = next((size for size in _BLOCK_SIZES if size >= n_rows), most)
    return {
        "KEY": key,
        "LOOPS": n_rows > size,
        "BLOCK_SIZE": size,
        "STORE_SIZE": min(size, _STORE_SIZE),
        "threads": min(size // _ELEMENTS_PER_THREAD, _MOST_THREADS),
    }
