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


def norm(grads: Sequence[Tensor], weights: Sequence[Tensor], etas: Sequence[float | None], draw: Draw | None) -> Tensor:
    """Return ||m T g||_2 over all tensors; see `ops.norm`."""
    measured = list(grads)
    for i, eta in enumerate(etas):
        if eta is not None:
            measured[i] = weights[i].double().abs().add_(eta).mul_(grads[i])
        if draw is not None and draw.keep_probability is not None:
            measured[i] = torch.where(mask_of(draw, i, grads[i]), measured[i], 0)
    parts = [_norm_of([measured[i] for i in positions]) for positions in buckets(map(place, measured))]
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


def found_nonfinite(grads: Sequence[Tensor]) -> Tensor:
    """Return 1.0 if any entry of any tensor is inf or NaN, else 0.0; see `ops.found_nonfinite`."""
    device = grads[0].device
    alike = buckets(map(place, grads))
    # A finite sum proves its terms finite, and large tensors are only read for it; one that is not may have overflowed.
    if reads_scalars(device) and math.isfinite(
        sum(t.sum().item() for positions in alike for t in _joined([grads[i] for i in positions]))
    ):
        return torch.zeros((), dtype=torch.float32, device=device)
    flags: list[Tensor] = []
    for positions in alike:
        some = [grads[i] for i in positions]
        flag, one = (torch.full((), value, dtype=torch.float32, device=some[0].device) for value in (0.0, 1.0))
        torch._amp_foreach_non_finite_check_and_unscale_(some, flag, one)
        flags.append(flag.to(device))
    return torch.stack(flags).amax()
