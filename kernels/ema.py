"""Exponential moving averages of a list of tensors, in one pass over memory."""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from operator import attrgetter

import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels.calls import Call
from fastsam.kernels.chunk_access import COLUMNS, aligned_length, element_ptr, find_chunk, narrow, widen
from fastsam.kernels.launch import block_size, launch_calls, wide, widest
from fastsam.kernels.launch_tables import ELEMENTS, Launch, Work

_itemsize = attrgetter("itemsize")


@triton.jit
def _ema_stretch(
    v_base, w_base, start, length, weight,
    AVERAGE: tl.constexpr, VALUE: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Average `length` elements from `start`: v + weight (w - v)."""
    offsets = tl.arange(0, LANES)
    mask = offsets < length
    v_ptr = element_ptr(v_base, start, AVERAGE, WIDEST, ALIGNED) + offsets
    v = widen(tl.load(v_ptr, mask=mask), COMPUTE)
    w = widen(tl.load(element_ptr(w_base, start, VALUE, WIDEST, ALIGNED) + offsets, mask=mask), COMPUTE)
    # Computed from the nearer side, so that v = w stays as it is, and weights 0 and 1 give v and w.
    average = tl.where(weight < 0.5, v + weight * (w - v), w - (1 - weight) * (w - v))
    tl.store(v_ptr, narrow(average, AVERAGE), mask=mask)


@triton.jit
def _ema_kernel(
    rows_ptr, chunks_ptr, hyperparameters_ptr, found_inf_ptr,
    AVERAGE: tl.constexpr, VALUE: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """v = v + weight (w - v), weight = 1 - decay. Reads v, w; writes v: 12 B per float32 element. Overwrites v."""
    row_ptr, start, length = find_chunk(rows_ptr, chunks_ptr, COLUMNS + 2, BLOCK_SIZE)
    v_base = tl.load(row_ptr + COLUMNS)
    w_base = tl.load(row_ptr + COLUMNS + 1)
    weight = tl.load(hyperparameters_ptr).to(COMPUTE)
    if found_inf_ptr is not None:
        skipped = tl.load(found_inf_ptr) != 0
        # Weight 0 would leave v as it is too, but for a w that is not finite.
        length = tl.where(skipped, 0, length)
    done = aligned_length(length, v_base | w_base)
    _ema_stretch(v_base, w_base, start, done, weight, AVERAGE, VALUE, WIDEST, COMPUTE, True, BLOCK_SIZE)
    while done < length:
        _ema_stretch(
            v_base, w_base, start + done, length - done, weight,
            AVERAGE, VALUE, WIDEST, COMPUTE, False, BLOCK_SIZE // 4,
        )  # fmt: skip
        done += BLOCK_SIZE // 4


def ema_calls(launches: Sequence[Launch], decay: float, found_inf: Tensor | None) -> list[Call]:
    """Return the calls that move the averages; see `ops.ema_`. One launch for each pair of dtypes."""

    def work_of(each: Launch) -> Work:
        average, value = each.dtypes
        constants = {
            "AVERAGE": ELEMENTS[average],
            "VALUE": ELEMENTS[value],
            "WIDEST": widest(each.dtypes),
            "COMPUTE": wide(max(average, value, key=_itemsize)),
            "BLOCK_SIZE": block_size(*each.dtypes),
        }
        return Work(constants, (found_inf,), (None, ((1 - decay,),)))

    return launch_calls(_ema_kernel, launches, work_of)
