"""Norm and finite check of a list of gradients.

The norm takes two launches: sums of squares of every chunk, then one program that adds them in a fixed order, so that
runs repeat bit for bit. The check takes one: its last program to finish knows what all have found.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels import reference
from fastsam.kernels.chunk_access import COLUMNS, aligned_length, element_ptr, find_chunk, widen
from fastsam.kernels.launch import (
    ELEMENTS,
    Launch,
    block_size,
    counters,
    distinct,
    launch,
    mask_constants,
    on_device,
    split,
    t_of,
    widest,
)
from fastsam.kernels.philox import Draw, threshold
from fastsam.kernels.philox_triton import first_word, is_kept, join_seed, random_words, signed
from fastsam.kernels.tensor_list import buckets

_VECTORS = 4  # 128-bit accesses a thread: where one tensor is all, registers allow more of it
_FINISH_BLOCK_SIZE = 4096


@triton.jit
def _sum_of_squares(g, w, kept, adaptive, eta, ADAPTIVE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
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
        # 1e20 squared overflows float32 and 1e-20 squared vanishes in it; beside a sum above 1e-30 that does not count
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
    if WHOLE:  # of a tensor that is left out nothing is read
        length = tl.where(is_kept(first_word(seed, index, step), threshold), length, 0)
    addresses = g_base | w_base
    if MASKED:
        addresses |= first % 4  # words come four at a time
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


@torch.no_grad()
def norm(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    adaptive: Sequence[float | None] | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """Return ||m T g||_2 over all tensors; see `reference.norm`. Two launches, and one more for each further dtype."""
    etas = (None,) * len(grads) if adaptive is None else tuple(adaptive)
    is_adaptive = any(eta is not None for eta in etas)
    launches, rest = split(grads, weights) if is_adaptive else split(grads)
    parts = []
    if rest:
        some: Any = ([items[i] for i in rest] for items in (grads, weights if weights else grads, etas))
        some_grads, some_weights, some_etas = some
        some_draw = None if draw is None else draw.take(rest)
        parts.append(reference.norm(some_grads, some_weights, some_etas, some_draw))
    parts += [
        _norm_on_one_device([launches[i] for i in on_one_device], etas, draw, is_adaptive)
        for on_one_device in buckets(each.device for each in launches)
    ]
    if len(parts) == 1:
        return parts[0].to(grads[0].device)
    return torch.linalg.vector_norm(torch.stack([part.to(grads[0].device) for part in parts]))


def _norm_on_one_device(
    launches: Sequence[Launch], etas: tuple[float | None, ...], draw: Draw | None, is_adaptive: bool
) -> Tensor:
    device = launches[0].device
    keep = None if draw is None else draw.keep
    works = []
    for each in launches:
        mask = mask_constants(draw)
        # chunks of whole masks are those of none: sums are the same bits
        size = block_size(*each.dtypes, vectors=2 if is_adaptive or mask["MASKED"] else _VECTORS)
        sets, lines = _sets(each.of(etas), None if keep is None else each.of(keep))
        zeros = (0,) * len(each.rows)
        numbers = map(each.of, draw.addresses()) if draw is not None and keep is not None else (zeros, zeros)
        others = () if is_adaptive else (zeros,)  # no weights
        work = each.table(size, sets, lines, *others, *numbers)
        constants = {
            "GRAD": ELEMENTS[each.dtypes[0]],
            "WEIGHT": ELEMENTS[each.dtypes[-1]],
            "WIDEST": widest(each.dtypes),
            "ADAPTIVE": is_adaptive,
            "BLOCK_SIZE": size,
            **mask,
        }
        works.append((work, constants))
    n_partials = sum(work.n_programs for work, _ in works)
    partials = torch.empty(n_partials, dtype=torch.float64, device=device)
    result = torch.empty((), dtype=torch.float64, device=device)
    step, seed, advance = (0, 0, None) if draw is None or keep is None else (draw.step, draw.seed, draw.advance)
    with on_device(device):
        first = 0
        for work, constants in works:
            words = signed(step), signed(seed), signed(seed >> 32)
            launch(_squares_kernel, work.n_programs, *work, partials[first:], advance, *words, **constants)
            first += work.n_programs
        launch(_finish_norm_kernel, 1, partials, result, n_partials, BLOCK_SIZE=_FINISH_BLOCK_SIZE)
    return result


@lru_cache(32)
def _sets(
    etas: tuple[float | None, ...], keep: tuple[float, ...] | None
) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    thresholds = [0.0] * len(etas) if keep is None else [float(threshold(k)) for k in keep]
    return distinct([(*t_of(eta), limit) for eta, limit in zip(etas, thresholds, strict=True)])


@triton.jit
def _nonfinite_stretch(
    g_base, start, length, GRAD: tl.constexpr, WIDEST: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr
):
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


@torch.no_grad()
def found_nonfinite(grads: Sequence[Tensor]) -> Tensor:
    """Return 1.0 if any entry is inf or NaN, else 0.0; see `reference.found_nonfinite`. One launch for each dtype."""
    launches, rest = split(grads)
    flags = [reference.found_nonfinite([grads[i] for i in rest])] if rest else []
    flags += [
        _found_on_one_device([launches[i] for i in on_one_device])
        for on_one_device in buckets(each.device for each in launches)
    ]
    if len(flags) == 1:
        return flags[0].to(grads[0].device)
    return torch.stack([flag.to(grads[0].device) for flag in flags]).amax()


def _found_on_one_device(launches: Sequence[Launch]) -> Tensor:
    device = launches[0].device
    works = [(each.table(block_size(*each.dtypes, vectors=_VECTORS)), each.dtypes[0]) for each in launches]
    n_programs = sum(work.n_programs for work, _ in works)
    found = torch.empty((), device=device) if n_programs else torch.zeros((), device=device)
    with on_device(device), counters(1, device) as arrivals:
        for work, dtype in works:
            launch(
                _nonfinite_kernel, work.n_programs, work.rows, work.chunks, arrivals, found, n_programs,
                GRAD=ELEMENTS[dtype], WIDEST=widest([dtype]), BLOCK_SIZE=block_size(dtype, vectors=_VECTORS),
            )  # fmt: skip
    return found
