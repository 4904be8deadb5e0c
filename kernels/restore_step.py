"""Restore of the weights, alone or fused into an SGD step; and what every fused step shares.

A fused step reads the backup and writes the weight, so that restoring costs no memory traffic of its own.
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsam.kernels import reference, replay_tables
from fastsam.kernels.chunk_access import COLUMNS, aligned_length, element_ptr, find_chunk, narrow, widen
from fastsam.kernels.launch import (
    ELEMENTS,
    Launch,
    block_size,
    launch,
    on_device,
    split,
    to_device,
    wide,
    widest,
)
from fastsam.kernels.reference import SGDOptions
from fastsam.kernels.tensor_list import Backup

_INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _copy_stretch(w_base, b_base, start, length, WORD: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr):
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


@torch.no_grad()
def restore_(backup: Backup) -> None:
    """Copy the backup back into the weights that still wait for it, bit for bit. One launch for each width of dtype."""
    if not backup.valid:
        return
    weights, copies = backup.pending()
    launches, rest = split(weights, copies, by_width=True)
    if rest:
        torch._foreach_copy_([weights[i] for i in rest], [copies[i] for i in rest])
    for each in launches:
        size = block_size(*each.dtypes)
        work = each.table(size)
        word = _INTEGERS[each.dtypes[0].itemsize]
        with on_device(each.device):
            launch(_restore_kernel, work.n_programs, work.rows, work.chunks, WORD=word, BLOCK_SIZE=size)
    torch.autograd.graph.increment_version(weights)
    backup.discard()


# what every fused step shares


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


def step_hyperparameters(
    options: Sequence[Any], each: Launch, rest_of: Callable[[Any], tuple[float, ...]]
) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...], tuple[int, ...], list[Tensor]]:
    """Return each parameter's set of hyperparameters, the sets, addresses of learning rates, and what lies there.

    A learning rate that is a number heads its set, and its address is 0; a tensor must be kept until the launch.
    """
    positions: dict[int, int] = {}
    own = each.of(options)
    sets = tuple([positions.setdefault(id(o), len(positions)) for o in own])
    firsts = [own[sets.index(i)] for i in range(len(positions))]
    dtype = torch.float64 if each.dtypes[0] == torch.float64 else torch.float32  # what the kernel computes in
    bases, kept = [], []
    for o in firsts:
        tensors = [t for t in [to_device(o.lr, each.device, dtype) if _stays(o.lr, each) else None] if t is not None]
        bases.append(tensors[0].data_ptr() if tensors else 0)
        kept += tensors
    return sets, tuple(_lines(each, rest_of, firsts)), tuple([bases[i] for i in sets]), kept


def _lines(each: Launch, rest_of: Callable[[Any], tuple[float, ...]], options: Sequence[Any]) -> list[Any]:
    return [(0.0 if _stays(o.lr, each) else float(o.lr), *rest_of(o)) for o in options]


def _stays(lr: float | Tensor, each: Launch) -> bool:
    """Whether a learning rate stays where it is, on a device; a number on the host is free to read."""
    return isinstance(lr, Tensor) and lr.device.type in ("cuda", each.device.type)


def step_refresh(options: Sequence[Any], each: Launch, rest_of: Callable[[Any], tuple[float, ...]]) -> Any:
    """Return what refreshes the hyperparameters in replays; None outside of a capture."""
    return replay_tables.refresh_of(options, lambda now: _lines(each, rest_of, each.of(now)))


def step_constants(each: Launch, state_dtype: torch.dtype) -> dict[str, Any]:
    """Return what the kernel of a step is compiled for."""
    width = widest(each.dtypes)
    return {
        "WEIGHT": ELEMENTS[each.dtypes[0]],
        "GRAD": ELEMENTS[each.dtypes[2]],
        "STATE": ELEMENTS[state_dtype],
        "WIDEST": width,
        "COMPUTE": wide(each.dtypes[0]),
        # at most 8 elements a thread: so many tensors, widened to float32, fill the registers
        "BLOCK_SIZE": block_size(*each.dtypes, vectors=min(width // 16, 2)),
    }


# SGD


@triton.jit
def _sgd_stretch(
    w_base, source_base, g_base, m_base, start, length, skip, unscale,
    lr, momentum, undamped, decay, nesterov, sign,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, WIDEST: tl.constexpr, COMPUTE: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, IS_SCALED: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
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
        # scalers use powers of two, by whose inverse to multiply is to divide, without a division's slow path
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


@torch.no_grad()
def restore_sgd_step_(
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    options: Sequence[SGDOptions],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Set each weight to its source and take SGD's step from there; see `reference.restore_sgd_step_`.

    One launch for each dtype combination, with and without momentum.
    """
    launches, rest = split(weights, sources, grads, momentum_buffers)
    replay_tables.refuse_reference(rest, weights)
    if rest:
        lists: Any = (weights, sources, grads, momentum_buffers, options)
        some = ([items[i] for i in rest] for items in lists)
        reference.restore_sgd_step_(*some, grad_scale=grad_scale, found_inf=found_inf)
    for each in launches:
        sets, lines, rates, _kept = step_hyperparameters(options, each, _after_lr)
        constants = step_constants(each, each.dtypes[3])
        refresh = step_refresh(options, each, _after_lr)
        work = each.table(constants["BLOCK_SIZE"], sets, lines, rates, refresh=refresh)
        with on_device(each.device):
            launch(
                _restore_sgd_step_kernel, work.n_programs, *work,
                to_device(grad_scale, each.device), to_device(found_inf, each.device),
                HAS_MOMENTUM=momentum_buffers[each.rows[0]] is not None, **constants,
            )  # fmt: skip
    torch.autograd.graph.increment_version(weights)


def _after_lr(o: SGDOptions) -> tuple[float, ...]:
    return (o.momentum, 1 - o.dampening, o.weight_decay, float(o.nesterov), -1.0 if o.maximize else 1.0)
