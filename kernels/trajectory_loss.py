"""The loss of trajectory methods in one launch: cross-entropy, the KL to the past, the gradient and the record.

A program takes one row of the batch. It first sums exp(z), exp(z / tau) and exp(past / tau) relative to the largest
logits, then goes over the row again for the loss and the gradient, and puts the logits where the past lay. A row of up
to 2048 classes stays in registers between the two; a longer one is read twice, the second time from a cache. The last
program to finish adds up the losses of all rows in their order, so that runs repeat bit for bit.

A history whose width is a multiple of 16 is accessed in vectors whatever the number of classes, padding included, which
is never taken for data; so are logits and gradient where every row is aligned. A vector is 128 bits of the widest of
the three and as many elements of the others. Unaligned rows, as with 50,257 classes, are accessed in as many elements
at a time as the number of classes is a multiple of; caches make up for that.

Of rows with one id only the first is recorded, and where records are replaced in place it alone reads: each program
scans the ids before its own, so nothing races.
"""
# mypy: disable-error-code="no-untyped-def"

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels.launch import THREADS, launch, on_device, wide
from fastsam.kernels.launch_tables import lend_counters, numbers
from fastsam.kernels.loss_blocks import (
    add_all,
    find_sample,
    finish_block,
    int8_scale,
    largest_magnitude,
    load_all,
    load_block,
    record_block,
    reduce_losses,
    row_at,
)
from fastsam.kernels.past import Past

# Of a row, in the dtype of arithmetic: 8 float32 a thread.
_BYTES_IN_REGISTERS = 8192
_PADDING = 16


_POINTERS = [
    "logits_ptr", "targets_ptr", "rows_ptr", "scales_ptr", "tags_ptr", "ids_ptr", "errors_ptr",
    "new_rows_ptr", "new_scales_ptr", "new_tags_ptr",
    "numbers_ptr", "losses_ptr", "gradient_ptr", "loss_ptr", "scale_ptr", "counter_ptr",
]  # fmt: skip
_SIZES = [
    "logits_stride", "target_stride", "past_stride", "n_rows", "n_classes", "width", "n_samples", "epoch", "wanted",
    "ignore_index",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _record_kernel(
    logits_ptr, targets_ptr, rows_ptr, scales_ptr, tags_ptr, ids_ptr, errors_ptr,
    logits_stride, target_stride, past_stride, width, n_samples, epoch, wanted, n_classes, ignore_index,
    COMPUTE: tl.constexpr, HAS_CLASSES: tl.constexpr, VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr,
    PAST_VECTOR: tl.constexpr, WHOLE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCAN_SIZE: tl.constexpr,
):  # fmt: skip
    """history[ids[row]] = logits[row]. Reads logits; writes the history: 6 B per class from float32 to float16."""
    row = tl.program_id(0).to(tl.int64)
    counted = row >= 0
    if HAS_CLASSES:
        counted = tl.load(targets_ptr + row * target_stride) != ignore_index
    past_row, _, takes_part = find_sample(
        ids_ptr, targets_ptr, errors_ptr, row, n_samples, counted, target_stride, ignore_index, HAS_CLASSES, SCAN_SIZE
    )
    z_ptr = row_at(logits_ptr, row, logits_stride, VECTOR)
    past_ptr = row_at(rows_ptr, past_row, past_stride, PAST_VECTOR)
    # A row that takes no part has length 0: nothing of it is read or written.
    z_length = n_classes // VECTOR * VECTOR * takes_part.to(tl.int32)
    past_length = width // PAST_VECTOR * PAST_VECTOR * takes_part.to(tl.int32)
    magnitude = tl.zeros((), tl.float32)
    if scales_ptr is not None:
        start = tl.zeros((), tl.int32)
        while start < n_classes:
            z = load_block(z_ptr, start, z_length, COMPUTE, VECTOR, BLOCK_SIZE)
            magnitude = tl.maximum(magnitude, largest_magnitude(z, n_classes - start))
            start += BLOCK_SIZE
        tl.store(scales_ptr + past_row, int8_scale(magnitude), mask=takes_part)
    tl.store(tags_ptr + past_row, epoch, mask=takes_part)
    start = tl.zeros((), tl.int32)
    while start < n_classes:
        z = load_block(z_ptr, start, z_length, COMPUTE, VECTOR, BLOCK_SIZE)
        record_block(past_ptr, start, n_classes, past_length, z, int8_scale(magnitude), PAST_VECTOR, BLOCK_SIZE)
        start += BLOCK_SIZE


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _trajectory_loss_kernel(
    logits_ptr, targets_ptr, rows_ptr, scales_ptr, tags_ptr, ids_ptr, errors_ptr,
    logits_stride, target_stride, past_stride, width, n_samples, epoch, wanted, n_classes, ignore_index,
    new_rows_ptr, new_scales_ptr, new_tags_ptr,
    numbers_ptr, losses_ptr, gradient_ptr, loss_ptr, scale_ptr, counter_ptr, n_rows,
    RECORDS: tl.constexpr, IN_PLACE: tl.constexpr, REDUCTION: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_CLASSES: tl.constexpr, VECTOR: tl.constexpr, TARGET_VECTOR: tl.constexpr, PAST_VECTOR: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCAN_SIZE: tl.constexpr,
):  # fmt: skip
    """losses[row], gradient[row] = cross-entropy + weight KL(past || current); history[ids[row]] = logits[row].

    Reads logits, past; writes gradient, history: 12 B per class with float32 logits and a float16 history.
    """
    HAS_PAST: tl.constexpr = rows_ptr is not None
    HAS_HISTORY: tl.constexpr = ids_ptr is not None
    QUANTISES: tl.constexpr = RECORDS and scales_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    inverse_tau = tl.load(numbers_ptr).to(COMPUTE)
    weight = tl.load(numbers_ptr + 1).to(COMPUTE)
    kl_gradient_scale = tl.load(numbers_ptr + 2).to(COMPUTE)
    tau = tl.load(numbers_ptr + 3).to(COMPUTE)
    smoothing = tl.load(numbers_ptr + 4).to(COMPUTE)
    z_ptr = row_at(logits_ptr, row, logits_stride, VECTOR)
    gradient_ptr = row_at(gradient_ptr, row, n_classes, VECTOR)
    target_class = row * 0
    counted = row >= 0
    target_sum = tl.zeros((), COMPUTE)
    if HAS_CLASSES:
        target_class = tl.load(targets_ptr + row * target_stride)
        counted = target_class != ignore_index
        target_sum = tl.where((target_class >= 0) & (target_class < n_classes), target_sum + 1, float("nan"))
    soft_ptr = row_at(targets_ptr, row, target_stride, TARGET_VECTOR)
    past_row, takes_part, has_past = row, counted, counted
    scale = tl.full((), 1.0, COMPUTE)
    if HAS_HISTORY:
        past_row, has_past, takes_part = find_sample(
            ids_ptr, targets_ptr, errors_ptr, row, n_samples, counted, target_stride, ignore_index,
            HAS_CLASSES, SCAN_SIZE,
        )  # fmt: skip
        if IN_PLACE:
            has_past = takes_part
        has_past = has_past & (tl.load(tags_ptr + past_row) == wanted)
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + past_row).to(COMPUTE)
    # A row without a past, or that is not recorded, has length 0 there: nothing of it is read or written.
    # All classes, written so that the compiler sees the factor.
    length = n_classes // VECTOR * VECTOR
    width = width // PAST_VECTOR * PAST_VECTOR
    z_length, past_length = length * counted.to(tl.int32), width * has_past.to(tl.int32)
    record_length = width * takes_part.to(tl.int32)
    past_ptr = z_ptr
    if HAS_PAST:
        past_ptr = row_at(rows_ptr, past_row, past_stride, PAST_VECTOR)

    z_largest = tl.full((), float("-inf"), COMPUTE)
    z_sum = tl.zeros((), COMPUTE)
    q_sum, t_largest, p_sum, magnitude = z_sum, z_largest, z_sum, tl.zeros((), tl.float32)
    start = tl.zeros((), tl.int32)
    if WHOLE:
        z, t, target = load_all(
            z_ptr, past_ptr, soft_ptr, target_class, start, n_classes, z_length, past_length, scale, smoothing,
            COMPUTE, HAS_PAST, HAS_CLASSES, VECTOR, TARGET_VECTOR, PAST_VECTOR, BLOCK_SIZE,
        )  # fmt: skip
        z_largest, z_sum, q_sum, t_largest, p_sum, target_sum, magnitude = add_all(
            z, t, target, n_classes, z_largest, z_sum, q_sum, t_largest, p_sum, target_sum, magnitude,
            inverse_tau, HAS_PAST, HAS_CLASSES, QUANTISES,
        )  # fmt: skip
    else:
        while start < n_classes:
            z, t, target = load_all(
                z_ptr, past_ptr, soft_ptr, target_class, start, n_classes, z_length, past_length, scale, smoothing,
                COMPUTE, HAS_PAST, HAS_CLASSES, VECTOR, TARGET_VECTOR, PAST_VECTOR, BLOCK_SIZE,
            )  # fmt: skip
            z_largest, z_sum, q_sum, t_largest, p_sum, target_sum, magnitude = add_all(
                z, t, target, n_classes - start, z_largest, z_sum, q_sum, t_largest, p_sum, target_sum, magnitude,
                inverse_tau, HAS_PAST, HAS_CLASSES, QUANTISES,
            )  # fmt: skip
            start += BLOCK_SIZE

    # The sum is 0 without a finite logit, and NaN with a logit that is NaN or inf.
    has_past = has_past & (p_sum > 0)
    new_scale = int8_scale(magnitude)
    record_ptr = past_ptr
    if RECORDS:
        record_ptr = row_at(new_rows_ptr, past_row, past_stride, PAST_VECTOR)
    z_factor, q_factor, p_factor = target_sum / z_sum, kl_gradient_scale / q_sum, kl_gradient_scale / p_sum
    start = tl.zeros((), tl.int32)
    if WHOLE:
        target_logit, spread = finish_block(
            z, t, target, gradient_ptr, record_ptr, start, length, record_length, counted, has_past, new_scale,
            z_largest, t_largest, z_factor, q_factor, p_factor, inverse_tau,
            HAS_PAST, RECORDS, VECTOR, PAST_VECTOR, BLOCK_SIZE,
        )  # fmt: skip
    else:
        target_logit, spread = tl.zeros((), COMPUTE), tl.zeros((), COMPUTE)
        while start < n_classes:
            z, t, target = load_all(
                z_ptr, past_ptr, soft_ptr, target_class, start, n_classes, z_length, past_length, scale, smoothing,
                COMPUTE, HAS_PAST, HAS_CLASSES, VECTOR, TARGET_VECTOR, PAST_VECTOR, BLOCK_SIZE,
            )  # fmt: skip
            some_target_logit, some_spread = finish_block(
                z, t, target, gradient_ptr, record_ptr, start, length, record_length, counted, has_past, new_scale,
                z_largest, t_largest, z_factor, q_factor, p_factor, inverse_tau,
                HAS_PAST, RECORDS, VECTOR, PAST_VECTOR, BLOCK_SIZE,
            )  # fmt: skip
            target_logit += some_target_logit
            spread += some_spread
            start += BLOCK_SIZE

    loss = tl.log(z_sum) * target_sum - target_logit
    if HAS_PAST:
        # The log of a quotient: a difference of logs would lose digits.
        divergence = spread / (p_sum * tau) - tl.log(p_sum / q_sum)
        loss += tl.where(has_past, weight * divergence, 0.0)
    if RECORDS:
        tl.store(new_tags_ptr + past_row, epoch, mask=takes_part)
        if QUANTISES:
            tl.store(new_scales_ptr + past_row, new_scale, mask=takes_part)
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))
    if REDUCTION == "none":
        tl.store(scale_ptr, tl.full((), 1.0, COMPUTE), mask=row == 0)
    else:
        arrival = (counted.to(tl.int64) << 32) + 1
        count = tl.atomic_add(counter_ptr, arrival) + arrival
        if (count & 0xFFFFFFFF) == n_rows:
            reduce_losses(losses_ptr, loss_ptr, scale_ptr, n_rows, count >> 32, COMPUTE, REDUCTION == "mean", SCAN_SIZE)
            tl.store(counter_ptr, tl.zeros((), tl.int64))


def trajectory_loss(
    logits: Tensor,
    targets: Tensor,
    past: Past | None,
    *,
    tau: float,
    weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the gradient of each row and its scale; see `ops.trajectory_loss`.

    One launch. A row whose target is no class gets NaN, since a device cannot raise.
    """
    n, n_classes = logits.shape
    logits, targets = _with_unit_stride(logits), _with_unit_stride(targets)
    if past is not None and past.ids is None:
        past = Past(_with_unit_stride(past.rows))
    device, dtype = logits.device, torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(n, dtype=dtype, device=device)
    gradient = torch.empty(n, n_classes, dtype=logits.dtype, device=device)
    loss, scale = torch.empty((), dtype=dtype, device=device), torch.empty((), dtype=dtype, device=device)
    counter, give_back = lend_counters(1, device)
    with on_device(device):
        launch(
            _trajectory_loss_kernel, n, *_arguments(logits, targets, past, ignore_index), *_recorded(past),
            numbers((1 / tau, weight, weight / tau, tau, label_smoothing), device),
            losses, gradient, loss, scale, counter, n,
            RECORDS=past is not None and past.record, IN_PLACE=past is not None and past.in_place, REDUCTION=reduction,
            **_constants(logits, targets, past),
            # Unfused, both sides of every difference are the same bits where past and current are.
            enable_fp_fusion=False,
        )  # fmt: skip
    give_back()
    return losses if reduction == "none" else loss, gradient, scale


def record_(logits: Tensor, past: Past, targets: Tensor | None, ignore_index: int) -> None:
    """Record the logits in the history; see `ops.record_`. One launch."""
    logits = _with_unit_stride(logits)
    classes = None if targets is None or targets.is_floating_point() else targets
    with on_device(logits.device):
        launch(
            _record_kernel, len(logits), *_arguments(logits, classes, past, ignore_index),
            **_constants(logits, classes, past),
        )  # fmt: skip


def _with_unit_stride(tensor: Tensor) -> Tensor:
    """The same, with the elements of a row side by side."""
    return tensor if tensor.dim() < 2 or tensor.stride(1) == 1 else tensor.contiguous()


def _arguments(logits: Tensor, targets: Tensor | None, past: Past | None, ignore_index: int) -> tuple[Any, ...]:
    """What both kernels are told first."""
    n_classes, target_stride = logits.shape[1], 0 if targets is None else targets.stride(0)
    if past is None:
        return logits, targets, *(None,) * 5, logits.stride(0), target_stride, 0, 0, 0, 0, 0, n_classes, ignore_index
    rows = past.rows
    return (
        logits, targets, rows, past.scales, past.tags, past.ids, past.errors,
        logits.stride(0), target_stride, rows.stride(0), _width(rows, n_classes), len(rows), past.epoch, past.wanted,
        n_classes, ignore_index,
    )  # fmt: skip


def _recorded(past: Past | None) -> tuple[Tensor | None, ...]:
    """Rows, scales and tags that are recorded into; None where nothing is."""
    return (None,) * 3 if past is None or not past.record else past.recorded[:3]


def _constants(logits: Tensor, targets: Tensor | None, past: Past | None) -> dict[str, Any]:
    """What both kernels are compiled for."""
    n_classes, compute = logits.shape[1], wide(logits.dtype)
    probabilities = targets if targets is not None and targets.dim() == 2 else None
    matrices = [logits, probabilities, None if past is None else past.rows]
    # As many elements of each at a time as make 16 bytes of the widest, so that a thread holds the same ones of all.
    vector = 16 // max(t.element_size() for t in matrices if t is not None)
    most = _BYTES_IN_REGISTERS * 8 // compute.primitive_bitwidth
    size = min(max(triton.next_power_of_2(n_classes), _PADDING), most)
    whole = size >= n_classes
    threads = min(max(size // 8, 32), THREADS)
    # A loop needs more registers, and with a scale of its own for every record yet more.
    size = size if whole else size // (2 if past is None or past.scales is None or not past.record else 4)
    return {
        "COMPUTE": compute,
        "HAS_CLASSES": targets is not None and targets.dim() == 1,
        "VECTOR": _vector(logits, n_classes, vector),
        "TARGET_VECTOR": 1 if probabilities is None else _vector(probabilities, n_classes, vector),
        "PAST_VECTOR": 1 if past is None else _vector(past.rows, _width(past.rows, n_classes), vector),
        "WHOLE": whole,
        "BLOCK_SIZE": size,
        "SCAN_SIZE": 4 * threads,
        "threads": threads,
    }


def _width(rows: Tensor, n_classes: int) -> int:
    """Columns of the past that are read: with a history's padding, up to a multiple of 16."""
    return min(rows.shape[1], -(-n_classes // _PADDING) * _PADDING)


def _vector(matrix: Tensor, width: int, most: int) -> int:
    """How many elements one access can take, at most, in every row."""
    return gcd(width, matrix.stride(0), matrix.data_ptr() // matrix.element_size(), most)
