"""Restore of the weights, alone or fused into an SGD step; and what every fused step shares.

A fused step reads the backup and writes the weight, so that restoring costs no memory traffic of its own.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels import replay_tables
from fastsam.kernels.calls import Call
from fastsam.kernels.chunk_access import COLUMNS, aligned_length, element_ptr, find_chunk, narrow, widen
from fastsam.kernels.launch import block_size, launch_calls, wide, widest
from fastsam.kernels.launch_tables import ELEMENTS, Launch, Work
from fastsam.kernels.reference import SGDOptions

_INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _copy_stretch(w_base, b_base, start, length, WORD: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr):
    """Copy `length` elements of the backup from `start` into the weight, as integers."""
    offsets = tl.arange(0, LANES)
    mask = offsets < length
    bits = tl.load(element_ptr(b_base, start, WORD, WORD.primitive_bitwidth, ALIGNED) + offsets, mask=mask)
    tl.store(element_ptr(w_base, start, WORD, WORD.primitive_bitwidth, ALIGNED) + offsets, bits, mask=mask)


@triton.jit
def _restore_kernel(rows_ptr, chunks_ptr, WORD: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """w = backup, as integers, so that every bit survives. Reads backup; writes w: 8 B per float32 element."""
    row_ptr, start, length = find_chunk(rows_ptr, chunks_ptr, COLUMNS + 2, BLOCK_SIZE)
    w_base = tl.load(row_ptr + COLUMNS)
    b_base = tl.load(row_ptr + COLUMNS + 1)
    done = aligned_length(length, w_base | b_base)
    _copy_stretch(w_base, b_base, start, done, WORD, True, BLOCK_SIZE)
    while done < length:
        _copy_stretch(w_base, b_base, start + done, length - done, WORD, False, BLOCK_SIZE // 4)
        done += BLOCK_SIZE // 4


def restore_calls(launches: Sequence[Launch]) -> list[Call]:
    """Return the calls that copy the backups back into the weights; see `ops.restore_`. One for each width of dtype."""

    def work_of(each: Launch) -> Work:
        return Work({"WORD": _INTEGERS[each.dtypes[0].itemsize], "BLOCK_SIZE": block_size(*each.dtypes)})

    return launch_calls(_restore_kernel, launches, work_of)


# What every fused step shares.


@triton.jit
def learning_rate(lr_base, set_ptr, COMPUTE: tl.constexpr):
    """The number that heads the hyperparameters, or the 0-dim tensor at the row's own address."""
    from_tensor = tl.load(lr_base.to(tl.pointer_type(COMPUTE)), mask=lr_base != 0, other=0).to(tl.float64)
    return tl.where(lr_base != 0, from_tensor, tl.load(set_ptr))


@triton.jit
def final_gradient(g_ptr, mask, skip, unscale, sign, decay, value, COMPUTE: tl.constexpr, IS_SCALED: tl.constexpr):
    """The gradient that the step follows; one that a GradScaler scaled is unscaled in place, unless in a skip."""
    g = tl.load(g_ptr, mask=mask)
    grad = widen(g, COMPUTE)
    if IS_SCALED:
        grad *= unscale
        tl.store(g_ptr, tl.where(skip, g, narrow(grad, g.dtype)), mask=mask)
    grad *= sign
    return tl.where(decay != 0, grad + decay * value, grad)


def step_work(
    each: Launch,
    options: Sequence[Any],
    after_lr: Callable[[Any], tuple[float, ...]],
    scalars: tuple[Tensor | None, Tensor | None],
    kept: list[Tensor],
) -> Work:
    """Return what the kernel of a fused step is told, but for what is its own.

    Args:
        each: the launch.
        options: hyperparameters of all parameters.
        after_lr: returns the numbers of a set behind the learning rate.
        scalars: grad_scale and found_inf.
        kept: takes tensors that are to be kept until the launch is over.
    """
    width = widest(each.dtypes)
    constants = {
        "WEIGHT": ELEMENTS[each.dtypes[0]],
        "GRAD": ELEMENTS[each.dtypes[2]],
        "STATE": ELEMENTS[each.dtypes[3]],
        "WIDEST": width,
        "COMPUTE": wide(each.dtypes[0]),
        # At most 8 elements a thread, since so many tensors, widened to float32, fill the registers.
        "BLOCK_SIZE": block_size(*each.dtypes, vectors=min(width // 16, 2)),
    }
    own = each.of(options)
    positions: dict[int, int] = {}
    sets = tuple([positions.setdefault(id(o), len(positions)) for o in own])
    firsts = [own[sets.index(i)] for i in range(len(positions))]
    addresses = [_lr_address(o.lr, each, kept) for o in firsts]
    refresh = replay_tables.refresh_of(options, lambda now: _lines(each, after_lr, each.of(now)))
    lr_column = tuple([addresses[i] for i in sets])
    return Work(constants, scalars, (sets, tuple(_lines(each, after_lr, firsts))), refresh, (lr_column,))


def _lr_address(lr: float | Tensor, each: Launch, kept: list[Tensor]) -> int:
    """Return where a learning rate lies on the device, as a kernel computes with it; 0 for a number."""
    if not _stays(lr, each):
        return 0
    dtype = torch.float64 if each.dtypes[0] == torch.float64 else torch.float32
    kept.append(lr.to(each.device, dtype, non_blocking=True))  # type: ignore[union-attr]
    return kept[-1].data_ptr()


def _lines(each: Launch, after_lr: Callable[[Any], tuple[float, ...]], options: Sequence[Any]) -> list[Any]:
    return [(0.0 if _stays(o.lr, each) else float(o.lr), *after_lr(o)) for o in options]


def _stays(lr: float | Tensor, each: Launch) -> bool:
    """Whether a learning rate stays where it is, on a device; a number on the host is free to read."""
    return isinstance(lr, Tensor) and lr.device.type in ("cuda", each.device.type)


# SGD's step.


@triton.jit
def _sgd_stretch(
    w_base, source_base, g_base, m_base, start, length, skip, unscale,
    lr, momentum, undamped, decay, nesterov, sign,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, IS_SCALED: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """SGD's step of `length` elements from `start`, as `_restore_sgd_step_kernel` says."""
    offsets = tl.arange(0, LANES)
    mask = offsets < length
    w = tl.load(element_ptr(source_base, start, WEIGHT, WIDEST, ALIGNED) + offsets, mask=mask)
    g_ptr = element_ptr(g_base, start, GRAD, WIDEST, ALIGNED) + offsets
    value = widen(w, COMPUTE)
    grad = final_gradient(g_ptr, mask, skip, unscale, sign, decay, value, COMPUTE, IS_SCALED)
    if HAS_MOMENTUM:
        m_ptr = element_ptr(m_base, start, STATE, WIDEST, ALIGNED) + offsets
        m = tl.load(m_ptr, mask=mask)
        buffer = momentum * widen(m, COMPUTE) + undamped * grad
        tl.store(m_ptr, tl.where(skip, m, narrow(buffer, STATE)), mask=mask)
        grad = tl.where(nesterov, grad + momentum * buffer, buffer)
    stepped = (value - lr * grad).to(WEIGHT)
    tl.store(element_ptr(w_base, start, WEIGHT, WIDEST, ALIGNED) + offsets, tl.where(skip, w, stepped), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr", "found_inf_ptr"])
def _restore_sgd_step_kernel(
    rows_ptr, chunks_ptr, hyperparameters_ptr, grad_scale_ptr, found_inf_ptr,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """d = +-g / scale + decay w; m = momentum m + (1 - dampening) d; w = source - lr (m, or d + momentum m).

    Reads source, g, m; writes w, m: 20 B per float32 element, 12 B without momentum, 4 B more with a scale.
    Overwrites w, m, and g where it is unscaled; with found_inf it restores w alone.
    """
    row_ptr, start, length = find_chunk(rows_ptr, chunks_ptr, COLUMNS + 5, BLOCK_SIZE)
    w_base = tl.load(row_ptr + COLUMNS)
    source_base = tl.load(row_ptr + COLUMNS + 1)
    g_base = tl.load(row_ptr + COLUMNS + 2)
    m_base = tl.load(row_ptr + COLUMNS + 3)
    set_ptr = hyperparameters_ptr + tl.load(row_ptr + 1) * 6
    lr = learning_rate(tl.load(row_ptr + COLUMNS + 4), set_ptr, COMPUTE).to(COMPUTE)
    momentum = tl.load(set_ptr + 1).to(COMPUTE)
    undamped = tl.load(set_ptr + 2).to(COMPUTE)
    decay = tl.load(set_ptr + 3).to(COMPUTE)
    nesterov = tl.load(set_ptr + 4) != 0
    sign = tl.load(set_ptr + 5).to(COMPUTE)
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    unscale = 1.0
    if grad_scale_ptr is not None:
        # Scales are powers of two: multiplying by the inverse is exact, and faster than a division.
        unscale = (1.0 / tl.load(grad_scale_ptr).to(tl.float64)).to(COMPUTE)
    done = aligned_length(length, w_base | source_base | g_base | m_base)
    _sgd_stretch(
        w_base, source_base, g_base, m_base, start, done, skip, unscale,
        lr, momentum, undamped, decay, nesterov, sign,
        WEIGHT, GRAD, STATE, WIDEST, COMPUTE, HAS_MOMENTUM, grad_scale_ptr is not None, True, BLOCK_SIZE,
    )  # fmt: skip
    while done < length:
        _sgd_stretch(
            w_base, source_base, g_base, m_base, start + done, length - done, skip, unscale,
            lr, momentum, undamped, decay, nesterov, sign,
            WEIGHT, GRAD, STATE, WIDEST, COMPUTE, HAS_MOMENTUM, grad_scale_ptr is not None, False, BLOCK_SIZE // 4,
        )  # fmt: skip
        done += BLOCK_SIZE // 4


def sgd_step_calls(
    launches: Sequence[Launch], options: Sequence[SGDOptions], grad_scale: Tensor | None, found_inf: Tensor | None
) -> list[Call]:
    """Return the calls of SGD's step; see `ops.sgd_step_calls`.

    One launch for each dtype combination, with and without momentum.
    """
    kept: list[Tensor] = []

    def work_of(each: Launch) -> Work:
        work = step_work(each, options, _after_lr, (grad_scale, found_inf), kept)
        return work._replace(constants=work.constants | {"HAS_MOMENTUM": each.present[3]})

    return [*launch_calls(_restore_sgd_step_kernel, launches, work_of), partial(kept.clear)]


def _after_lr(o: SGDOptions) -> tuple[float, ...]:
    return (o.momentum, 1 - o.dampening, o.weight_decay, float(o.nesterov), -1.0 if o.maximize else 1.0)
