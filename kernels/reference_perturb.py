"""Reference implementation of the perturbation of a list of weights."""

import math
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from fastsam.kernels.philox import Draw
from fastsam.kernels.reference_common import arithmetic_dtype, mask_of, place, random_words, reads_scalars
from fastsam.kernels.tensor_list import Backup, buckets

E0 = 1e-12
"""Added to the norm in the denominator of every perturbation."""

_dtype = attrgetter("dtype")


def perturb_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Backup,
    norm: Tensor,
    rho: Sequence[float],
    etas: Sequence[float | None],
    draw: Draw | None,
    e0: float,
) -> None:
    """Save `weights` into `backup` and perturb them; see `ops.perturb_`."""
    torch._foreach_copy_(backup.tensors, list(weights))
    backup.mark_complete()
    reciprocal = _reciprocal(norm, e0)
    is_masked = draw is not None and draw.keep_probability is not None
    keys = zip(map(place, weights), map(_dtype, grads), rho, [eta is None for eta in etas], strict=True)
    for positions in buckets(keys):
        first = weights[positions[0]]
        scale = reciprocal * rho[positions[0]]
        if isinstance(scale, Tensor):
            scale = float(scale) if reads_scalars(first.device) else scale.to(first.device)
        # Without this, an inf among the gradients times 0 would be NaN.
        if isinstance(scale, float) and scale == 0:
            continue
        # On the CPU foreach would round the scale to a 16-bit dtype.
        is_wide = first.dtype not in (torch.float16, torch.bfloat16)
        if isinstance(scale, float) and is_wide and etas[positions[0]] is None and not is_masked:
            torch._foreach_add_([weights[i] for i in positions], [grads[i] for i in positions], alpha=scale)
            continue
        for i in positions:
            _perturb_one(weights[i], grads[i], scale, etas[i], draw, i)


def _reciprocal(norm: Tensor, e0: float) -> Tensor | float:
    """1 / (norm + e0), and 0 for a norm along which nothing can be perturbed."""
    if reads_scalars(norm.device):
        length = float(norm)
        return 1 / (length + e0) if 0 < length < math.inf else 0.0
    return torch.where(torch.isfinite(norm) & (norm > 0), 1 / (norm + e0), 0.0)


def _perturb_one(
    weight: Tensor, grad: Tensor, scale: Tensor | float, eta: float | None, draw: Draw | None, position: int
) -> None:
    wide = arithmetic_dtype(weight.dtype)
    w = weight.to(wide)
    # The scale goes first: scale * g is moderate where g alone times w^2 may leave float32's range.
    if draw is not None and draw.keep_probability is not None and draw.whole:
        scale = torch.where(mask_of(draw, position, weight), scale, 0.0)
    eps = grad.to(wide) * (scale.to(wide) if isinstance(scale, Tensor) else scale)
    if isinstance(scale, Tensor):
        eps = torch.where(scale == 0, 0.0, eps)
    if eta is not None:
        t = w.abs().add_(eta)
        eps = eps * t * t
    if draw is not None and draw.keep_probability is not None and not draw.whole:
        eps = torch.where(mask_of(draw, position, weight), eps, 0)
    moved = w + eps
    if draw is not None and draw.rounding and weight.dtype in (torch.float16, torch.bfloat16):
        moved = round_stochastically(moved, weight.dtype, random_words(draw, position, weight))
    weight.copy_(torch.where(scale == 0, w, moved) if isinstance(scale, Tensor) else moved)


def round_stochastically(values: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Round float32 `values` to a neighbour in a 16-bit dtype, up with the probability of the part cut off.

    The low 16 bits of the random word decide, so that its high bits stay free for a Bernoulli mask. Values the dtype
    can represent, inf and NaN among them, stay as they are.
    """
    noise = (words & 0xFFFF).int()
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + noise) & -0x10000).view(torch.float32)
    else:
        rounded = ((bits + (noise & 0x1FFF)) & -0x2000).view(torch.float32)
        # Below 2^-14 float16 is a grid of step 2^-24.
        steps = values.abs() * 2.0**24
        steps = steps.floor() + (noise * 2.0**-16 < steps - steps.floor())
        rounded = torch.where(values.abs() < 2.0**-14, (steps * 2.0**-24).copysign(values), rounded)
    return torch.where(torch.isfinite(values), rounded, values)
