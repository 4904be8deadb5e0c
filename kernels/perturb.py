"""Backup and perturbation of a list of weights, in one pass over memory."""
# mypy: disable-error-code="no-untyped-def"

import itertools
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels import replay_tables
from fastsam.kernels.chunk_access import COLUMNS, aligned_length, element_ptr, find_chunk, widen
from fastsam.kernels.launch import (
    block_size,
    launch_lists,
    mask_constants,
    random_arguments,
    random_columns,
    t_of,
    wide,
    widest,
)
from fastsam.kernels.launch_tables import ELEMENTS, Launch, Work, chunks_of, distinct
from fastsam.kernels.philox import Draw, threshold
from fastsam.kernels.philox_triton import first_word, is_kept, join_seed, random_words
from fastsam.kernels.tensor_list import Backup, in_memory_order


@triton.jit
def _round_stochastically(values, words, DTYPE: tl.constexpr):
    """Round float32 values to a neighbour in a 16-bit dtype; reference_perturb.py says how."""
    noise = (words & 0xFFFF).to(tl.int32)
    bits = values.to(tl.int32, bitcast=True)
    if DTYPE.is_bf16():
        rounded = ((bits + noise) & -0x10000).to(tl.float32, bitcast=True)
    else:
        rounded = ((bits + (noise & 0x1FFF)) & -0x2000).to(tl.float32, bitcast=True)
        # Below 2^-14 float16 is a grid of step 2^-24.
        steps = tl.abs(values) * 16777216.0
        whole = tl.floor(steps)
        whole += (noise.to(tl.float32) * 1.52587890625e-05 < steps - whole).to(tl.float32)
        magnitude = (whole * 5.9604644775390625e-08).to(tl.int32, bitcast=True)
        small = (magnitude | (bits & -0x80000000)).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(values) < 6.103515625e-05, small, rounded)
    return tl.where(tl.abs(values) < float("inf"), rounded, values).to(DTYPE)


@triton.jit
def _perturb_stretch(
    w_base, g_base, b_base, scale, adaptive, eta, start, length, mark_ptr, mark,
    seed, index, first, step, threshold,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr,
    MASKED: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Copy `length` weights from `start` to the backup, store the mark that says so, then perturb the weights."""
    offsets = tl.arange(0, LANES)
    mask = offsets < length
    w_ptr = element_ptr(w_base, start, WEIGHT, WIDEST, ALIGNED) + offsets
    w = tl.load(w_ptr, mask=mask)
    g = tl.load(element_ptr(g_base, start, GRAD, WIDEST, ALIGNED) + offsets, mask=mask)
    tl.store(element_ptr(b_base, start, WEIGHT, WIDEST, ALIGNED) + offsets, w, mask=mask)
    tl.store(mark_ptr, mark)
    # The scale goes first: scale * g is moderate where g alone times w^2 may leave float32's range.
    eps = widen(g, COMPUTE) * scale
    if ADAPTIVE:
        t = tl.where(adaptive, tl.abs(widen(w, COMPUTE)) + eta, 1.0)
        eps = eps * t * t
    if MASKED or STOCHASTIC:
        words = random_words(seed, index, step, first + start, ALIGNED, LANES)
    if MASKED:
        eps = tl.where(is_kept(words, threshold), eps, 0.0)
    moved = widen(w, COMPUTE) + eps
    if STOCHASTIC:
        perturbed = _round_stochastically(moved, words, WEIGHT)
    else:
        perturbed = moved.to(WEIGHT)
    tl.store(w_ptr, tl.where(scale == 0, w, perturbed), mask=mask)


@triton.jit(
    do_not_specialize=["tick", "step", "seed_low", "seed_high"],
    do_not_specialize_on_alignment=["norm_ptr", "advance_ptr"],
)
def _perturb_kernel(
    rows_ptr, chunks_ptr, hyperparameters_ptr, norm_ptr, marks_ptr, advance_ptr, tick, step, seed_low, seed_high,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """backup = w; w += rho m T^2 g / (norm + e0), T = 1 or |w| + eta, m = 1 or a random mask. Overwrites w.

    The mask is of elements, or with WHOLE one draw for the whole tensor. With advance_ptr the step of random numbers
    moves on by what lies there.

    Reads w, g; writes w, backup: 16 B per float32 element. After each stretch of copies and before the change of its
    weights, a chunk's mark becomes (tick of this launch, number of elements copied).
    """
    row_ptr, start, length = find_chunk(rows_ptr, chunks_ptr, COLUMNS + 5, BLOCK_SIZE)
    w_base = tl.load(row_ptr + COLUMNS)
    g_base = tl.load(row_ptr + COLUMNS + 1)
    b_base = tl.load(row_ptr + COLUMNS + 2)
    index = tl.load(row_ptr + COLUMNS + 3).to(tl.uint32)
    first = tl.load(row_ptr + COLUMNS + 4)
    set_ptr = hyperparameters_ptr + tl.load(row_ptr + 1) * 5
    norm = tl.load(norm_ptr).to(tl.float64)
    reciprocal = 1.0 / (norm + tl.load(set_ptr + 1))
    reciprocal = tl.where((norm > 0) & (norm < float("inf")), reciprocal, 0.0)
    scale = (reciprocal * tl.load(set_ptr)).to(COMPUTE)
    adaptive = tl.load(set_ptr + 2) != 0
    eta = tl.load(set_ptr + 3).to(COMPUTE)
    threshold = tl.load(set_ptr + 4)
    seed, step = join_seed(seed_low, seed_high), step.to(tl.uint32, bitcast=True)
    if advance_ptr is not None:
        step += tl.load(advance_ptr).to(tl.uint32)
    if WHOLE:
        scale = tl.where(is_kept(first_word(seed, index, step), threshold), scale, 0.0).to(COMPUTE)
    mark_ptr = marks_ptr + tl.program_id(0)
    mark = tick.to(tl.int64) << 32
    addresses = w_base | g_base | b_base
    if MASKED or STOCHASTIC:
        # Random words come four at a time.
        addresses |= first % 4
    done = aligned_length(length, addresses)
    _perturb_stretch(
        w_base, g_base, b_base, scale, adaptive, eta, start, done, mark_ptr, mark + done,
        seed, index, first, step, threshold,
        WEIGHT, GRAD, WIDEST, COMPUTE, ADAPTIVE, MASKED, STOCHASTIC, True, BLOCK_SIZE,
    )  # fmt: skip
    while done < length:
        copied = tl.minimum(done + BLOCK_SIZE // 4, length)
        _perturb_stretch(
            w_base, g_base, b_base, scale, adaptive, eta, start + done, copied - done, mark_ptr, mark + copied,
            seed, index, first, step, threshold,
            WEIGHT, GRAD, WIDEST, COMPUTE, ADAPTIVE, MASKED, STOCHASTIC, False, BLOCK_SIZE // 4,
        )  # fmt: skip
        done = copied


_ticks = itertools.count(1)


def perturb_(
    launches: Sequence[Launch],
    backup: Backup,
    norm: Tensor,
    rho: Sequence[float],
    etas: tuple[float | None, ...],
    draw: Draw | None,
    e0: float,
) -> None:
    """Save the weights into the backup and perturb them; see `ops.perturb_`. One launch for each dtype combination.

    The host is never told how far a device came, so no copy is known complete before the weights change: after an
    interrupt the marks that the kernel leaves tell which are.
    """
    keep_probability = None if draw is None else draw.keep_probability
    tick = next(_ticks)
    marked: list[tuple[Launch, int, Tensor]] = []
    backup.begin(partial(_copied, backup, marked, tick))

    def work_of(each: Launch) -> Work:
        dtype, grad_dtype, _ = each.dtypes
        size = block_size(*each.dtypes)
        stochastic = draw is not None and draw.rounding and dtype.itemsize == 2
        used = draw if stochastic or keep_probability is not None else None
        own = each.of(etas), None if keep_probability is None else each.of(keep_probability), e0
        marks = _marks(backup, each, size)
        marked.append((each, size, marks))
        constants = {
            "WEIGHT": ELEMENTS[dtype],
            "GRAD": ELEMENTS[grad_dtype],
            "WIDEST": widest(each.dtypes),
            "COMPUTE": wide(dtype),
            "ADAPTIVE": own[0].count(None) < len(own[0]),
            "STOCHASTIC": stochastic,
            "BLOCK_SIZE": size,
            **mask_constants(draw),
            # Product and sum are rounded as in the reference, or stochastic rounding would differ.
            "enable_fp_fusion": False,
        }
        arguments = norm, marks, None if used is None else used.advance, tick, *random_arguments(used)
        refresh = replay_tables.refresh_of(rho, partial(_lines_of, each, own))
        return Work(constants, arguments, _sets(each.of(rho), *own), refresh, random_columns(used, each))

    launch_lists(_perturb_kernel, launches, work_of)
    backup.mark_complete()


def _marks(backup: Backup, each: Launch, size: int) -> Tensor:
    """Return an int64 for each program, where it says how many elements it has copied."""
    marks, n_programs = backup.marks.get(each.positions), each.n_programs(size)
    if marks is None or len(marks) != n_programs:
        marks = backup.marks[each.positions] = torch.zeros(n_programs, dtype=torch.int64, device=each.device)
    replay_tables.hold(marks)
    return marks


def _lines(
    rho: tuple[float, ...], etas: tuple[float | None, ...], keep_probability: tuple[float, ...] | None, e0: float
) -> list[tuple[float, ...]]:
    thresholds = [0.0] * len(rho) if keep_probability is None else [float(threshold(k)) for k in keep_probability]
    return [(r, e0, *t_of(eta), limit) for r, eta, limit in zip(rho, etas, thresholds, strict=True)]


@lru_cache(32)
def _sets(*arguments: Any) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    return distinct(_lines(*arguments))


def _lines_of(each: Launch, others: Any, rho: Sequence[float]) -> list[tuple[float, ...]]:
    return _lines(each.of(rho), *others)


def _copied(backup: Backup, marked: list[tuple[Launch, int, Tensor]], tick: int) -> list[tuple[Tensor, Tensor]]:
    """Stretches of weights whose copies the launch numbered `tick` has completed, beside these copies."""
    pairs = []
    for each, size, marks in marked:
        for (row, chunk), mark in zip(chunks_of(each.lengths, size).tolist(), marks.tolist(), strict=True):
            if mark >> 32 == tick:
                stretch = slice(chunk * size, chunk * size + (mark & 0xFFFFFFFF))
                weight, copy = backup.weights[each.positions[row]], backup.tensors[each.positions[row]]
                pairs.append((in_memory_order(weight)[stretch], in_memory_order(copy)[stretch]))
    return pairs
