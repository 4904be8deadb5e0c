"""The step that raises the loss most, to first order, in a ball of any p-norm: SAM's Eq. 2, ASAM's where T is not 1.

    1/p + 1/q = 1
    eps = rho T sign(g) (|T g| / ||T g||_q)^(q-1)        ||T^-1 eps||_p = rho,   eps . g = rho ||T g||_q

    p = inf, q = 1:    eps = rho T sign(g)
    p = 1, q = inf:    all of rho on the first of the largest |T g|

The 2-norm has kernels of its own; all others are computed by torch, tensor by tensor, in float64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.distributed.dtensor import largest_over_ranks, sum_over_ranks
from fastsam.two_pass.ascent import Ascent


@torch.no_grad()
def direction(ascent: Ascent, p: float, etas: Sequence[float | None] | None) -> tuple[list[Tensor], Tensor]:
    """Return eps / rho for each tensor, and ||T g||_q over all tensors and ranks, 0-dim float64.

    Sums of powers are of |T g| over the largest of them, so that neither gradients of 1e-20 or 1e20 nor a q of 1e3
    leave float64's range.

    Args:
        ascent: the tensors to perturb, and their gradients.
        p: of the norm that rho is measured in, at least 1; inf. 1 takes whole weights.
        etas: for each tensor eta of `T = |w| + eta`, or None for T = 1; None altogether means T = 1.
    """
    q = conjugate(p)
    sizes = list(map(_Size, ascent.grads, ascent.weights, etas or [None] * len(ascent.weights)))
    tops = torch.stack([size.largest().to(ascent.grads[0].device) for size in sizes])
    top = tops.amax()
    if any(ascent.placements):
        top = top.reshape(1)
        largest_over_ranks(top, ascent.params, "the largest entry of the gradient")
        top = top[0]
    if math.isinf(q):
        if any(ascent.placements):
            raise ValueError("p=1 perturbs one entry of all weights, but these are sharded; pass a larger p")
        # torch.argmax takes the first of equals
        chosen = tops.argmax()
        return [size.first_of_largest(chosen == i) for i, size in enumerate(sizes)], top
    scale = torch.where(top > 0, top, 1.0)

    def sum_of(rows: list[int]) -> Tensor:
        return torch.stack([sizes[i].power_sum(scale, q).to(top.device) for i in rows]).sum()

    total = sum_over_ranks(sum_of, ascent.placements) if any(ascent.placements) else sum_of(list(range(len(sizes))))
    norm = scale * total ** (1 / q)
    return [size.along(torch.where(norm > 0, norm, 1.0), q) for size in sizes], torch.where(top > 0, norm, top)


def conjugate(p: float) -> float:
    """Return q of 1/p + 1/q = 1."""
    if math.isinf(p):
        return 1.0
    return math.inf if p == 1 else p / (p - 1)


class _Size:
    """|T g| of one tensor, computed anew for each use: in float64 it would fill twice the gradient's memory.

    Args:
        g: the gradient.
        w: the weight.
        eta: of T = |w| + eta; None for T = 1.
    """

    def __init__(self, g: Tensor, w: Tensor, eta: float | None) -> None:
        self._g, self._w, self._eta = g, w, eta

    def _t(self) -> Tensor | float:
        return 1.0 if self._eta is None else self._w.double().abs() + self._eta

    def _value(self) -> Tensor:
        return (self._t() * self._g.double()).abs()

    def largest(self) -> Tensor:
        """Return the largest entry, 0-dim; 0 of an empty tensor."""
        return self._value().amax() if self._g.numel() else self._g.new_zeros((), dtype=torch.float64)

    def power_sum(self, scale: Tensor, q: float) -> Tensor:
        """Return the sum of (|T g| / scale)^q, 0-dim."""
        return (self._value() / scale.to(self._g.device)).pow(q).sum()

    def along(self, norm: Tensor, q: float) -> Tensor:
        """Return T sign(g) (|T g| / norm)^(q-1)."""
        power = (self._value() / norm.to(self._g.device)).pow(q - 1)
        return self._rounded(self._t() * self._g.sign().double() * power)

    def first_of_largest(self, is_here: Tensor) -> Tensor:
        """Return T sign(g) at the first largest entry if that is the largest of all tensors, and zeros elsewhere."""
        flat = torch.zeros(self._g.numel(), dtype=torch.float64, device=self._g.device)
        if len(flat):
            step = (self._t() * self._g.sign().double()).reshape(-1)
            position = self._value().reshape(-1).argmax().reshape(1)
            flat.scatter_(0, position, step.gather(0, position) * is_here.to(flat.device))
        return self._rounded(flat.view(self._g.shape))

    def _rounded(self, step: Tensor) -> Tensor:
        dtype = torch.float64 if self._w.dtype is torch.float64 else torch.float32
        # in the weight's own layout, which the kernels walk
        return torch.empty_like(self._w, dtype=dtype).copy_(step)
