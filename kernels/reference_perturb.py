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


@torch.no_grad()
def perturb_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Backup,
    norm: Tensor,
    rho: Sequence[float],
    adaptive: Sequence[float | None] | None = None,
    draw: Draw | None = None,
    e0: float = E0,
) -> None:
    """Save `weights` into `backup` and add eps = rho m T^2 g / (norm + e0) to them, T = 1 or |w| + eta.

    SAM Eq. 2 with p = 2; ASAM Eq. 7; ESAM Eq. 5 with its mask m and rho / beta for rho. A norm that is zero, inf or
    NaN gives eps = 0.

    Args:
        weights: tensors to perturb in place; the storage stays where it is.
        grads: their gradients, of the same shapes.
        backup: made for exactly `weights`; becomes valid.
        norm: 0-dim tensor, ||T g||_2 over all tensors.
        rho: for each tensor its radius; a negative one perturbs downhill (maximize).
        adaptive: for each tensor eta of T = |w| + eta, or None for T = 1; None altogether means T = 1.
        draw: random numbers of the mask, and for rounding the sum stochastically to 16-bit weights; None means m = 1
            and rounding to nearest.
        e0: added to the norm.
    """
    torch._foreach_copy_(backup.tensors, list(weights))
    backup.mark_complete()
    reciprocal = _reciprocal(norm, e0)
    etas = [None] * len(weights) if adaptive is None else adaptive
    is_masked = draw is not None and draw.keep is not None
    keys = zip(map(place, weights), map(_dtype, grads), rho, [eta is None for eta in etas], strict=True)
    for rows in buckets(keys):
        first = weights[rows[0]]
        scale = reciprocal * rho[rows[0]]
        if isinstance(scale, Tensor):
            scale = float(scale) if reads_scalars(first.device) else scale.to(first.device)
        if isinstance(scale, float) and scale == 0:  # not inf * 0
            continue
        # foreach on the CPU would round the scale to a 16-bit dtype
        is_wide = first.dtype not in (torch.float16, torch.bfloat16)
        if isinstance(scale, float) and is_wide and etas[rows[0]] is None and not is_masked:
            torch._foreach_add_([weights[i] for i in rows], [grads[i] for i in rows], alpha=scale)
            continue
        for i in rows:
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
    # the scale goes first: scale * g is moderate where g alone times w^2 may leave float32's range
    if draw is not None and draw.keep is not None and draw.whole:
        scale = torch.where(mask_of(draw, position, weight), scale, 0.0)
    eps = grad.to(wide) * (scale.to(wide) if isinstance(scale, Tensor) else scale)
    if isinstance(scale, Tensor):
        eps = torch.where(scale == 0, 0.0, eps)
    if eta is not None:
        t = w.abs().add_(eta)
        eps = eps * t * t
    if draw is not None and draw.keep is not None and not draw.whole:
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
        # below 2^-14 float16 is a grid of step 2^-24
        steps = values.abs() * 2.0**24
        steps = steps.floor() + (noise * 2.0**-16 < steps - steps.floor())
        rounded = torch.where(values.abs() < 2.0**-14, (steps * 2.0**-24).copysign(values), rounded)
    return torch.where(torch.isfinite(values), rounded, values)
