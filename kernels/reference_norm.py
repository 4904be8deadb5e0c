"""Reference implementations of the norm and the finite check of a list of gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.kernels.philox import Draw
from fastsam.kernels.reference_common import mask_of, place, reads_scalars
from fastsam.kernels.tensor_list import buckets, in_memory_order

PIECE = 2**16
"""Elements that one thread sums at a time in `norm`: half a megabyte in float64, which a core's cache holds."""
SMALL = 2**12
"""Elements up to which a tensor on the CPU costs more in calls than in memory, so that it is joined with others."""


@torch.no_grad()
def norm(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    adaptive: Sequence[float | None] | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """Return ||m T g||_2 over all tensors, T = 1 or |w| + eta (SAM Eq. 2 with p = 2; ASAM Eq. 4; ESAM's mask m).

    Args:
        grads: floating-point tensors of any shapes, dtypes and devices; at least one.
        weights: tensors of the same shapes; needed only with `adaptive`.
        adaptive: for each tensor eta of T = |w| + eta, or None for T = 1; None altogether means T = 1.
        draw: random numbers of the mask, if it has `keep`; None means m = 1.

    Returns:
        0-dim float64 tensor on the first tensor's device. Squares are summed in float64, so entries from 1e-20 to
        1e20 neither overflow nor vanish; a non-finite entry gives a non-finite norm.
    """
    measured = list(grads)
    for i, eta in enumerate(adaptive or [None] * len(grads)):
        if eta is not None:
            measured[i] = weights[i].double().abs().add_(eta).mul_(grads[i])
        if draw is not None and draw.keep is not None:
            measured[i] = torch.where(mask_of(draw, i, grads[i]), measured[i], 0)
    parts = [_norm_of([measured[i] for i in rows]) for rows in buckets(map(place, measured))]
    if len(parts) == 1:
        return parts[0]
    device = grads[0].device
    return torch.linalg.vector_norm(torch.stack([part.to(device) for part in parts]))


def _norm_of(tensors: list[Tensor]) -> Tensor:
    """The float64 norm of all tensors, which share a device and a dtype.

    torch's own norm writes a float64 copy of all that it is given, on the CPU to memory that may be fresh from the
    system every time; there one scratch, which stays in the cache, serves all pieces.
    """
    if tensors[0].device.type != "cpu":
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)))
    scratch = torch.empty(PIECE * torch.get_num_threads(), dtype=torch.float64)
    squares: list[Tensor] = []
    for t in _joined(tensors):
        for piece in in_memory_order(t).split(len(scratch)):
            wide = scratch[: len(piece)].copy_(piece)
            squares.append(torch.dot(wide, wide))
    return torch.stack(squares).sum().sqrt()


def _joined(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of one device and dtype, of which the small ones, whose calls cost more than their memory, become one."""
    small = [t.ravel() for t in tensors if t.numel() <= SMALL]
    return [t for t in tensors if t.numel() > SMALL] + ([torch.cat(small)] if small else [])


@torch.no_grad()
def found_nonfinite(grads: Sequence[Tensor]) -> Tensor:
    """Return 1.0 if any entry of any tensor is inf or NaN, else 0.0.

    Args:
        grads: floating-point tensors of any shapes, dtypes and devices; at least one.

    Returns:
        0-dim float32 tensor on the first tensor's device.
    """
    device = grads[0].device
    alike = buckets(map(place, grads))
    # a finite sum proves its terms finite, and only reads where tensors are large; another one may have overflowed
    if reads_scalars(device) and math.isfinite(
        sum(t.sum().item() for rows in alike for t in _joined([grads[i] for i in rows]))
    ):
        return torch.zeros((), device=device)
    flags: list[Tensor] = []
    for rows in alike:
        flag, one = grads[rows[0]].new_zeros((), dtype=torch.float32), torch.ones((), device=grads[rows[0]].device)
        torch._amp_foreach_non_finite_check_and_unscale_([grads[i] for i in rows], flag, one)
        flags.append(flag.to(device))
    return torch.stack(flags).amax()
