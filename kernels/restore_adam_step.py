"""Restore of the weights fused into Adam's or AdamW's step."""
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels.calls import Call
from fastsam.kernels.chunk_access import COLUMNS, aligned_length, element_ptr, find_chunk, narrow, widen
from fastsam.kernels.launch import launch_calls
from fastsam.kernels.launch_tables import Launch, Work
from fastsam.kernels.reference import AdamOptions
from fastsam.kernels.restore_step import final_gradient, learning_rate, step_work


@triton.jit
def _adam_stretch(
    w_base, source_base, g_base, m_base, v_base, start, length, skip, unscale,
    step_size, beta1, beta2, unbeta1, unbeta2, eps, coupled_decay, shrinkage, sign,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr,
    IS_SCALED: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adam's step of `length` elements from `start`, as `_restore_adam_step_kernel` says."""
    offsets = tl.arange(0, LANES)
    mask = offsets < length
    w = tl.load(element_ptr(source_base, start, WEIGHT, WIDEST, ALIGNED) + offsets, mask=mask)
    g_ptr = element_ptr(g_base, start, GRAD, WIDEST, ALIGNED) + offsets
    m_ptr = element_ptr(m_base, start, STATE, WIDEST, ALIGNED) + offsets
    v_ptr = element_ptr(v_base, start, STATE, WIDEST, ALIGNED) + offsets
    m = tl.load(m_ptr, mask=mask)
    v = tl.load(v_ptr, mask=mask)
    value = widen(w, COMPUTE)
    grad = final_gradient(g_ptr, mask, skip, unscale, sign, coupled_decay, value, COMPUTE, IS_SCALED)
    mean = beta1 * widen(m, COMPUTE) + unbeta1 * grad
    square = beta2 * widen(v, COMPUTE) + unbeta2 * grad * grad
    tl.store(m_ptr, tl.where(skip, m, narrow(mean, STATE)), mask=mask)
    tl.store(v_ptr, tl.where(skip, v, narrow(square, STATE)), mask=mask)
    root = tl.sqrt(square) if COMPUTE.is_fp64() else tl.sqrt_rn(square)
    stepped = (value * shrinkage - step_size * (mean / (root + eps))).to(WEIGHT)
    tl.store(element_ptr(w_base, start, WEIGHT, WIDEST, ALIGNED) + offsets, tl.where(skip, w, stepped), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr", "found_inf_ptr"])
def _restore_adam_step_kernel(
    rows_ptr, chunks_ptr, hyperparameters_ptr, counters_ptr, grad_scale_ptr, found_inf_ptr,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """d = +-g / scale [+ decay w]; m, v = averages of d, d^2; w = [1 - lr decay] source - lr m' / (sqrt(v') + eps).

    m' = m / (1 - beta1^t), v' = v / (1 - beta2^t); decay in the first brackets is Adam's, in the second AdamW's.
    Reads source, g, m, v; writes w, m, v: 28 B per float32 element, 4 B more with a scale. Overwrites w, m, v, the step
    t, and g where it is unscaled; with found_inf it restores w alone. Every program of a tensor reads t and counts
    itself; the one that counts last advances t and clears the count.
    """
    row_ptr, start, length = find_chunk(rows_ptr, chunks_ptr, COLUMNS + 7, BLOCK_SIZE)
    w_base = tl.load(row_ptr + COLUMNS)
    source_base = tl.load(row_ptr + COLUMNS + 1)
    g_base = tl.load(row_ptr + COLUMNS + 2)
    m_base = tl.load(row_ptr + COLUMNS + 3)
    v_base = tl.load(row_ptr + COLUMNS + 4)
    step_ptr = tl.load(row_ptr + COLUMNS + 5).to(tl.pointer_type(tl.float32))
    set_ptr = hyperparameters_ptr + tl.load(row_ptr + 1) * 9
    lr = learning_rate(tl.load(row_ptr + COLUMNS + 6), set_ptr, COMPUTE)
    beta1 = tl.load(set_ptr + 1)
    beta2 = tl.load(set_ptr + 2)
    decay = tl.load(set_ptr + 4)
    decoupled = tl.load(set_ptr + 5) != 0
    sign = tl.load(set_ptr + 6).to(COMPUTE)
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    unscale = 1.0
    if grad_scale_ptr is not None:
        # Scales are powers of two: multiplying by the inverse is exact, and faster than a division.
        unscale = (1.0 / tl.load(grad_scale_ptr).to(tl.float64)).to(COMPUTE)
    before = tl.load(step_ptr)
    step = before.to(tl.float64) + 1
    # One division: m' / (sqrt(v') + eps) = (root / correction1) m / (sqrt(v) + root eps), root = sqrt(correction2).
    root = tl.sqrt(1 - tl.exp2(step * tl.load(set_ptr + 8)))
    step_size = (lr * root / (1 - tl.exp2(step * tl.load(set_ptr + 7)))).to(COMPUTE)
    eps = (tl.load(set_ptr + 3) * root).to(COMPUTE)
    coupled_decay = tl.where(decoupled, 0.0, decay).to(COMPUTE)
    shrinkage = tl.where(decoupled, 1 - lr * decay, 1.0).to(COMPUTE)
    unbeta1, unbeta2 = (1 - beta1).to(COMPUTE), (1 - beta2).to(COMPUTE)
    beta1, beta2 = beta1.to(COMPUTE), beta2.to(COMPUTE)
    done = aligned_length(length, w_base | source_base | g_base | m_base | v_base)
    _adam_stretch(
        w_base, source_base, g_base, m_base, v_base, start, done, skip, unscale,
        step_size, beta1, beta2, unbeta1, unbeta2, eps, coupled_decay, shrinkage, sign,
        WEIGHT, GRAD, STATE, WIDEST, COMPUTE, grad_scale_ptr is not None, True, BLOCK_SIZE,
    )  # fmt: skip
    while done < length:
        _adam_stretch(
            w_base, source_base, g_base, m_base, v_base, start + done, length - done, skip, unscale,
            step_size, beta1, beta2, unbeta1, unbeta2, eps, coupled_decay, shrinkage, sign,
            WEIGHT, GRAD, STATE, WIDEST, COMPUTE, grad_scale_ptr is not None, False, BLOCK_SIZE // 4,
        )  # fmt: skip
        done += BLOCK_SIZE // 4
    # Every thread has to read t before it is advanced.
    tl.debug_barrier()
    counter_ptr = counters_ptr + tl.load(chunks_ptr + 2 * tl.program_id(0))
    n_arrived = tl.atomic_add(counter_ptr, 1) + 1
    is_last = n_arrived == (tl.load(row_ptr) + BLOCK_SIZE - 1) // BLOCK_SIZE
    tl.store(step_ptr, before + 1, mask=is_last & (skip == 0))
    tl.store(counter_ptr, tl.zeros((), tl.int64), mask=is_last)


def _after_lr(o: AdamOptions) -> tuple[float, ...]:
    logarithms = [math.log2(beta) if beta > 0 else -math.inf for beta in (o.beta1, o.beta2)]
    sign = -1.0 if o.maximize else 1.0
    return (o.beta1, o.beta2, o.eps, o.weight_decay, float(o.decoupled), sign, *logarithms)


def adam_step_calls(
    launches: Sequence[Launch],
    steps: Sequence[Tensor],
    options: Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[Call]:
    """Return the calls of Adam's or AdamW's step; see `ops.adam_step_calls`.

    One launch for each dtype combination.
    """
    kept: list[Tensor] = []
    step_addresses = tuple(map(Tensor.data_ptr, steps))

    def work_of(each: Launch) -> Work:
        work = step_work(each, options, _after_lr, (grad_scale, found_inf), kept)
        return work._replace(columns=(each.of(step_addresses), *work.columns), n_counters=len(each.positions))

    return [*launch_calls(_restore_adam_step_kernel, launches, work_of), partial(kept.clear)]
