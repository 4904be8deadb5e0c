"""Norm and finite check of a list of gradients.

The norm takes two launches: sums of squares of every chunk, then one program that adds them in a fixed order, so that
runs repeat bit for bit. The check takes one: its last program to finish knows what all have found.
"""
# mypy: disable-error-code="no-untyped-def"

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels.chunk_access import COLUMNS, aligned_length, element_ptr, find_chunk, widen
from fastsam.kernels.launch import (
    block_size,
    by_device,
    launch,
    launch_lists,
    mask_constants,
    on_device,
    random_arguments,
    random_columns,
    t_of,
    widest,
)
from fastsam.kernels.launch_tables import ELEMENTS, Launch, Work, distinct, lend_counters
from fastsam.kernels.philox import Draw, threshold
from fastsam.kernels.philox_triton import first_word, is_kept, join_seed, random_words

# 128-bit accesses a thread: a kernel that reads one tensor alone has registers for more of it.
_VECTORS = 4
_FINISH_BLOCK_SIZE = 4096


@triton.jit
def _sum_of_squares(g, w, kept, adaptive, eta, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
    """The sum of (m T g)^2 over some lanes, computed in COMPUTE and returned in float64; `kept` is the mask m."""
    product = widen(g, COMPUTE)
    if ADAPTIVE:
        product *= tl.where(adaptive, tl.abs(widen(w, COMPUTE)) + eta.to(COMPUTE), 1.0)
    if MASKED:
        product = tl.where(kept, product, 0.0)
    return tl.sum(product * product).to(tl.float64)


@triton.jit
def _square_stretch(
    g_base, w_base, adaptive, eta, start, length, seed, index, first, step, threshold,
    GRAD: tl.constexpr, WEIGHT: tl.constexpr, WIDEST: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sum of (m T g)^2 over `length` elements from `start`: aligned ones by vectors, others one a lane."""
    offsets = tl.arange(0, LANES)
    mask = offsets < length
    g = tl.load(element_ptr(g_base, start, GRAD, WIDEST, ALIGNED) + offsets, mask=mask, other=0)
    w = g
    if ADAPTIVE:
        w_mask = offsets < length * adaptive.to(tl.int32)
        w = tl.load(element_ptr(w_base, start, WEIGHT, WIDEST, ALIGNED) + offsets, mask=w_mask, other=0)
    kept = mask
    if MASKED:
        kept = is_kept(random_words(seed, index, step, first + start, ALIGNED, LANES), threshold)
    if WIDEST == 64:
        total = _sum_of_squares(g, w, kept, adaptive, eta, ADAPTIVE, MASKED, tl.float64)
    else:
        total = _sum_of_squares(g, w, kept, adaptive, eta, ADAPTIVE, MASKED, tl.float32)
        # 1e20 squared overflows float32, and 1e-20 squared vanishes in it, which beside a sum above 1e-30 is no loss.
        if not ((total > 1e-30) & (total < float("inf"))):
            total = _sum_of_squares(g, w, kept, adaptive, eta, ADAPTIVE, MASKED, tl.float64)
    return total


@triton.jit(
    do_not_specialize=["step", "seed_low", "seed_high"],
    do_not_specialize_on_alignment=["partials_ptr", "advance_ptr"],
)
def _squares_kernel(
    rows_ptr, chunks_ptr, hyperparameters_ptr, partials_ptr, advance_ptr, step, seed_low, seed_high,
    GRAD: tl.constexpr, WEIGHT: tl.constexpr, WIDEST: tl.constexpr, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """partials[chunk] = sum of (m T g)^2 over the chunk, T = 1 or |w| + eta, m = 1 or a random mask.

    The mask is of elements, or with WHOLE one draw for the whole tensor. With advance_ptr the step of random numbers
    moves on by what lies there.

    Reads g, and w where T is not 1: 4 or 8 B per float32 element. Sums in float32 where that is safe, else in float64
    from the registers, so that slow double-precision units do not set the pace.
    """
    row_ptr, start, length = find_chunk(rows_ptr, chunks_ptr, COLUMNS + 4, BLOCK_SIZE)
    g_base = tl.load(row_ptr + COLUMNS)
    w_base = tl.load(row_ptr + COLUMNS + 1)
    index = tl.load(row_ptr + COLUMNS + 2).to(tl.uint32)
    first = tl.load(row_ptr + COLUMNS + 3)
    set_ptr = hyperparameters_ptr + tl.load(row_ptr + 1) * 3
    adaptive = tl.load(set_ptr) != 0
    eta = tl.load(set_ptr + 1)
    threshold = tl.load(set_ptr + 2)
    seed, step = join_seed(seed_low, seed_high), step.to(tl.uint32, bitcast=True)
    if advance_ptr is not None:
        step += tl.load(advance_ptr).to(tl.uint32)
    # Nothing is read of a tensor that is masked out as a whole.
    if WHOLE:
        length = tl.where(is_kept(first_word(seed, index, step), threshold), length, 0)
    addresses = g_base | w_base
    if MASKED:
        # Random words come four at a time.
        addresses |= first % 4
    done = aligned_length(length, addresses)
    total = _square_stretch(
        g_base, w_base, adaptive, eta, start, done, seed, index, first, step, threshold,
        GRAD, WEIGHT, WIDEST, ADAPTIVE, MASKED, True, BLOCK_SIZE,
    )  # fmt: skip
    while done < length:
        total += _square_stretch(
            g_base, w_base, adaptive, eta, start + done, length - done, seed, index, first, step, threshold,
            GRAD, WEIGHT, WIDEST, ADAPTIVE, MASKED, False, BLOCK_SIZE // 8,
        )  # fmt: skip
        done += BLOCK_SIZE // 8
    tl.store(partials_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["n_partials"])
def _finish_norm_kernel(partials_ptr, norm_ptr, n_partials, BLOCK_SIZE: tl.constexpr):
    """norm = sqrt(sum of partials), by one program in a fixed order. Reads 8 B per chunk."""
    offsets = tl.arange(0, BLOCK_SIZE)
    sums = tl.zeros((BLOCK_SIZE,), dtype=tl.float64)
    first = 0
    while first < n_partials:
        sums += tl.load(partials_ptr + first + offsets, mask=offsets < n_partials - first, other=0)
        first += BLOCK_SIZE
    tl.store(norm_ptr, tl.sqrt(tl.sum(sums)))


def norm(launches: Sequence[Launch], etas: tuple[float | None, ...], draw: Draw | None) -> list[Tensor]:
    """Return the norm over the launches of each device; see `ops.norm`.

    Two launches on each, and one more for each further combination of dtypes.
    """
    used = None if draw is None or draw.keep_probability is None else draw
    return [_norm_on_one_device(some, etas, used) for some in by_device(launches)]


def _norm_on_one_device(launches: Sequence[Launch], etas: tuple[float | None, ...], draw: Draw | None) -> Tensor:
    device, mask = launches[0].device, mask_constants(draw)
    is_adaptive = etas.count(None) < len(etas)
    # Masks of whole tensors leave the chunks as they are without a mask, so that the sums are the same bits.
    vectors = 2 if is_adaptive or mask["MASKED"] else _VECTORS
    counts = [each.n_programs(block_size(*each.dtypes, vectors=vectors)) for each in launches]
    partials = torch.empty(sum(counts), dtype=torch.float64, device=device)
    firsts = itertools.accumulate(counts, initial=0)

    def work_of(each: Launch) -> Work:
        constants = {
            "GRAD": ELEMENTS[each.dtypes[0]],
            "WEIGHT": ELEMENTS[each.dtypes[-1]],
            "WIDEST": widest(each.dtypes),
            "ADAPTIVE": is_adaptive,
            "BLOCK_SIZE": block_size(*each.dtypes, vectors=vectors),
            **mask,
        }
        advance = None if draw is None else draw.advance
        arguments = partials[next(firsts) :], advance, *random_arguments(draw)
        keep_probability = None if draw is None or draw.keep_probability is None else each.of(draw.keep_probability)
        no_weights = () if is_adaptive else ((0,) * len(each.positions),)
        columns = *no_weights, *random_columns(draw, each)
        return Work(constants, arguments, _sets(each.of(etas), keep_probability), columns=columns)

    result = torch.empty((), dtype=torch.float64, device=device)
    launch_lists(_squares_kernel, launches, work_of)
    with on_device(device):
        launch(_finish_norm_kernel, 1, partials, result, len(partials), BLOCK_SIZE=_FINISH_BLOCK_SIZE)
    return result


@lru_cache(32)
def _sets(
    etas: tuple[float | None, ...], keep_probability: tuple[float, ...] | None
) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    thresholds = [0.0] * len(etas) if keep_probability is None else [float(threshold(k)) for k in keep_probability]
    return distinct([(*t_of(eta), limit) for eta, limit in zip(etas, thresholds, strict=True)])


@triton.jit
def _nonfinite_stretch(
    g_base, start, length, GRAD: tl.constexpr, WIDEST: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr
):
    """1 if one of `length` elements from `start` is inf or NaN, else 0."""
    offsets = tl.arange(0, LANES)
    g = tl.load(element_ptr(g_base, start, GRAD, WIDEST, ALIGNED) + offsets, mask=offsets < length, other=0)
    if WIDEST < 64:
        g = g.to(tl.float32)
    return tl.max(tl.where(tl.abs(g) < float("inf"), 0, 1))


@triton.jit(do_not_specialize=["n_programs"])
def _nonfinite_kernel(
    rows_ptr, chunks_ptr, counter_ptr, found_ptr, n_programs,
    GRAD: tl.constexpr, WIDEST: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """found = 1 if any element is inf or NaN, else 0. Reads g: 4 B per float32 element.

    One counter adds up arrivals in its low half and finds in its high half, in one atomic of integers: whoever arrives
    last holds the answer, writes it, and leaves the counter at zero for the next launch.
    """
    row_ptr, start, length = find_chunk(rows_ptr, chunks_ptr, COLUMNS + 1, BLOCK_SIZE)
    g_base = tl.load(row_ptr + COLUMNS)
    done = aligned_length(length, g_base)
    found = _nonfinite_stretch(g_base, start, done, GRAD, WIDEST, True, BLOCK_SIZE)
    while done < length:
        more = _nonfinite_stretch(g_base, start + done, length - done, GRAD, WIDEST, False, BLOCK_SIZE // 8)
        found = tl.maximum(found, more)
        done += BLOCK_SIZE // 8
    arrival = (found.to(tl.int64) << 32) + 1
    count = tl.atomic_add(counter_ptr, arrival) + arrival
    is_last = (count & 0xFFFFFFFF) == n_programs
    tl.store(found_ptr, tl.where(count >> 32 > 0, 1.0, 0.0), mask=is_last)
    tl.store(counter_ptr, tl.zeros((), tl.int64), mask=is_last)


def found_nonfinite(launches: Sequence[Launch]) -> list[Tensor]:
    """Return whether there is an inf or a NaN on each device; see `ops.found_nonfinite`. One launch for each dtype."""
    return [_found_on_one_device(some) for some in by_device(launches)]


def _found_on_one_device(launches: Sequence[Launch]) -> Tensor:
    device = launches[0].device
    n_programs = sum(each.n_programs(block_size(*each.dtypes, vectors=_VECTORS)) for each in launches)
    found = (torch.empty if n_programs else torch.zeros)((), dtype=torch.float32, device=device)
    arrivals, give_back = lend_counters(1, device)

    def work_of(each: Launch) -> Work:
        constants = {
            "GRAD": ELEMENTS[each.dtypes[0]],
            "WIDEST": widest(each.dtypes),
            "BLOCK_SIZE": block_size(*each.dtypes, vectors=_VECTORS),
        }
        return Work(constants, (arrivals, found, n_programs))

    launch_lists(_nonfinite_kernel, launches, work_of)
    give_back()
    return found
