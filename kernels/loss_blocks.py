"""Blocks of a row of logits: how trajectory_loss.py loads, sums, finishes and records them."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastsam.kernels import reference_trajectory_loss
from fastsam.kernels.chunk_access import narrow, widen

_LARGEST_HALF = tl.constexpr(reference_trajectory_loss.LARGEST_HALF)
_SMALLEST_SCALE = tl.constexpr(reference_trajectory_loss.SMALLEST_SCALE)


@triton.jit
def find_sample(ids_ptr, targets_ptr, errors_ptr, row, n_samples, counted, target_stride, ignore_index,
                 HAS_CLASSES: tl.constexpr, SCAN_SIZE: tl.constexpr):  # fmt: skip
    """The row of the history for this row of the batch, 0 if there is none; whether it has one, and is recorded."""
    sample = tl.load(ids_ptr + row)
    inside = (sample >= 0) & (sample < n_samples)
    if errors_ptr is not None:
        is_error = counted & (inside == 0)
        tl.atomic_add(errors_ptr, is_error.to(tl.int64), mask=is_error)
        tl.store(errors_ptr + 1, sample, mask=is_error)
    has_row = counted & inside
    is_repeated = tl.zeros((SCAN_SIZE,), tl.int32)
    first = tl.zeros((), tl.int64)
    while (first < row) & has_row:
        others = first + tl.arange(0, SCAN_SIZE)
        same = (others < row) & (tl.load(ids_ptr + others, mask=others < row, other=-1) == sample)
        if HAS_CLASSES:
            # Targets are read only where the ids are the same, which is rare.
            target_class = tl.load(targets_ptr + others * target_stride, mask=same, other=0)
            same = same & (target_class != ignore_index)
        is_repeated |= same.to(tl.int32)
        first += SCAN_SIZE
    return tl.where(has_row, sample, 0), has_row, has_row & (tl.max(is_repeated) == 0)


@triton.jit
def row_at(ptr, row, stride, VECTOR: tl.constexpr):
    """Pointer to a row, where accesses of so many elements are aligned."""
    return tl.multiple_of(ptr + row * stride, VECTOR * ptr.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def load_block(row_ptr, start, length, COMPUTE: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """Elements from `start` of a row of this length, -inf past its end."""
    ptr = tl.multiple_of(row_ptr + start, VECTOR * row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    offsets = tl.arange(0, LANES)
    mask = offsets < tl.multiple_of(length - start, VECTOR)
    if row_ptr.dtype.element_ty.is_int():
        x = tl.load(ptr + offsets, mask=mask, other=0).to(COMPUTE)
    else:
        x = widen(tl.load(ptr + offsets, mask=mask, other=0), COMPUTE)
    return tl.where(mask, x, float("-inf"))


@triton.jit
def store_block(row_ptr, start, length, x, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """Store x at `start` of a row of this length."""
    ptr = tl.multiple_of(row_ptr + start, VECTOR * row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    offsets = tl.arange(0, LANES)
    mask = offsets < tl.multiple_of(length - start, VECTOR)
    tl.store(ptr + offsets, x, mask=mask)


@triton.jit
def load_past(
    row_ptr, start, n_classes, length, scale, COMPUTE: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr
):
    """Past logits from `start`, -inf past the last class; a history's padding is read but not used."""
    t = load_block(row_ptr, start, length, COMPUTE, VECTOR, LANES)
    if row_ptr.dtype.element_ty.is_int():
        t *= scale
    return tl.where(tl.arange(0, LANES) < n_classes - start, t, float("-inf"))


@triton.jit
def load_targets(
    targets_ptr, target_class, start, n_classes, smoothing,
    COMPUTE: tl.constexpr, HAS_CLASSES: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Target probabilities from `start`, after smoothing; 0 past the last class."""
    offsets = tl.arange(0, LANES)
    if HAS_CLASSES:
        target = tl.where(start + offsets == target_class, 1.0, 0.0).to(COMPUTE)
    else:
        target = load_block(targets_ptr, start, n_classes // VECTOR * VECTOR, COMPUTE, VECTOR, LANES)
    target = target * (1 - smoothing) + smoothing / n_classes.to(COMPUTE)
    return tl.where(offsets < n_classes - start, target, 0.0)


@triton.jit
def add_exponentials(z, largest, total, total_soft, inverse_tau):
    """Add exp(z) and exp(inverse_tau z) to sums that are relative to the largest z so far."""
    new = tl.maximum(largest, tl.max(z))
    shift = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift))
    total_soft = total_soft * tl.exp((largest - shift) * inverse_tau) + tl.sum(tl.exp((z - shift) * inverse_tau))
    return new, total, total_soft


@triton.jit
def largest_magnitude(z, n):
    """Largest |z| of the first n; inf if there is a NaN, which a maximum would pass over."""
    magnitude = tl.abs(z.to(tl.float32))
    magnitude = tl.where(magnitude < float("inf"), magnitude, float("inf"))
    return tl.max(tl.where(tl.arange(0, z.shape[0]) < n, magnitude, 0.0))


@triton.jit
def int8_scale(magnitude):
    """The scale of a row of int8 with this largest magnitude: what one step stands for."""
    # 1 / 127, rounded to float32.
    return tl.maximum(magnitude * 0.007874015718698502, _SMALLEST_SCALE)


@triton.jit
def record_block(row_ptr, start, n_classes, length, z, scale, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """Write logits from `start` into the history, as `reference_trajectory_loss._encode` does, 0 in its padding."""
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    z = tl.where(tl.arange(0, LANES) < n_classes - start, z, 0.0)
    if DTYPE.is_int():
        steps = tl.div_rn(z.to(tl.float32), tl.zeros_like(z).to(tl.float32) + scale)
        steps = tl.where(steps == steps, steps, 0.0)
        # Adding 1.5 2^23 leaves no bits behind the point, so this rounds half to even.
        steps = (steps + 12582912.0) - 12582912.0
        store_block(row_ptr, start, length, steps.to(DTYPE), VECTOR, LANES)
    else:
        if DTYPE.is_fp16():
            clamped = tl.minimum(tl.maximum(z, -_LARGEST_HALF), _LARGEST_HALF)
            z = tl.where(tl.abs(z) < float("inf"), clamped, z)
        store_block(row_ptr, start, length, narrow(z, DTYPE), VECTOR, LANES)


@triton.jit
def load_all(
    z_ptr, past_ptr, soft_ptr, target_class, start, n_classes, z_length, past_length, scale, smoothing,
    COMPUTE: tl.constexpr, HAS_PAST: tl.constexpr, HAS_CLASSES: tl.constexpr,
    VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, PAST_VECTOR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Logits, past logits and target probabilities from `start`."""
    z = load_block(z_ptr, start, z_length, COMPUTE, VECTOR, LANES)
    t = z
    if HAS_PAST:
        t = load_past(past_ptr, start, n_classes, past_length, scale, COMPUTE, PAST_VECTOR, LANES)
    target = load_targets(
        soft_ptr, target_class, start, n_classes, smoothing, COMPUTE, HAS_CLASSES, TARGET_VECTOR, LANES
    )
    return z, t, target


@triton.jit
def add_all(
    z, t, target, n_left, z_largest, z_sum, q_sum, t_largest, p_sum, target_sum, magnitude, inverse_tau,
    HAS_PAST: tl.constexpr, HAS_CLASSES: tl.constexpr, QUANTISES: tl.constexpr,
):  # fmt: skip
    """Add a block to what has to be known of the whole row."""
    z_largest, z_sum, q_sum = add_exponentials(z, z_largest, z_sum, q_sum, inverse_tau)
    if HAS_PAST:
        t_largest, _, p_sum = add_exponentials(t, t_largest, p_sum, p_sum, inverse_tau)
    if QUANTISES:
        magnitude = tl.maximum(magnitude, largest_magnitude(z, n_left))
    if not HAS_CLASSES:
        target_sum += tl.sum(target)
    return z_largest, z_sum, q_sum, t_largest, p_sum, target_sum, magnitude


@triton.jit
def finish_block(
    z, t, target, gradient_ptr, record_ptr, start, length, record_length, counted, has_past, new_scale,
    z_largest, t_largest, z_factor, q_factor, p_factor, inverse_tau,
    HAS_PAST: tl.constexpr, RECORDS: tl.constexpr, VECTOR: tl.constexpr, PAST_VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Store the gradient and the record; return sums of target z and exp(t / tau) (t - z), of shifted logits."""
    shifted = z - z_largest
    gradient = tl.exp(shifted) * z_factor - target
    target_logit = tl.sum(tl.where(target != 0, target * shifted, 0.0))
    spread = tl.zeros_like(target_logit)
    if HAS_PAST:
        past_shifted = t - t_largest
        p = tl.exp(past_shifted * inverse_tau)
        spread = tl.sum(tl.where(p > 0, p * (past_shifted - shifted), 0.0))
        gradient += tl.where(has_past, tl.exp(shifted * inverse_tau) * q_factor - p * p_factor, 0.0)
    gradient = narrow(tl.where(counted, gradient, 0.0), gradient_ptr.dtype.element_ty)
    store_block(gradient_ptr, start, length, gradient, VECTOR, LANES)
    if RECORDS:
        # Every thread has to read the past before any overwrites it, since another may hold that part of the row.
        tl.debug_barrier()
        record_block(record_ptr, start, length, record_length, z, new_scale, PAST_VECTOR, LANES)
    return target_logit, spread


@triton.jit
def reduce_losses(losses_ptr, loss_ptr, scale_ptr, n_rows, count, COMPUTE: tl.constexpr, MEAN: tl.constexpr,
            LANES: tl.constexpr):  # fmt: skip
    """Add up all losses in a fixed order."""
    offsets = tl.arange(0, LANES)
    sums = tl.zeros((LANES,), dtype=tl.float64)
    first = 0
    while first < n_rows:
        sums += tl.load(losses_ptr + first + offsets, mask=offsets < n_rows - first, other=0).to(tl.float64)
        first += LANES
    loss = tl.sum(sums)
    scale = tl.full((), 1.0, tl.float64)
    if MEAN:
        loss = loss / count.to(tl.float64)
        scale = tl.where(count > 0, 1.0 / count.to(tl.float64), 0.0)
    tl.store(loss_ptr, loss.to(COMPUTE))
    tl.store(scale_ptr, scale.to(COMPUTE))
