"""Plain-torch twins of every launcher: the CPU's path, the tests' oracle and the benchmarks' baseline at once.

On the CPU a scalar such as the gradient norm is read as a Python number (that costs nothing there and lets one foreach
call do the work); elsewhere, or where `READ_SCALARS` is off, it stays a tensor and nothing waits for the device.
"""

import math
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from fastsam.kernels import philox
from fastsam.kernels.philox import Draw
from fastsam.kernels.tensor_list import Backup, buckets, in_memory_order, is_dense

READ_SCALARS = True
PIECE = 2**16
"""Elements that one thread sums at a time in `norm`: half a megabyte in float64, which a core's cache holds."""
SMALL = 2**12
"""Elements up to which a tensor on the CPU costs more in calls than in memory, so that it is joined with others."""
E0 = 1e-12
"""Added to the norm in the denominator of every perturbation."""


def _reads_scalars(device: torch.device) -> bool:
    return READ_SCALARS and device.type == "cpu"


place: Callable[[Tensor], tuple[torch.device, torch.dtype]] = attrgetter("device", "dtype")
_dtype = attrgetter("dtype")


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic runs in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
            measured[i] = torch.where(_mask(draw, i, grads[i]), measured[i], 0)
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
    if _reads_scalars(device) and math.isfinite(
        sum(t.sum().item() for rows in alike for t in _joined([grads[i] for i in rows]))
    ):
        return torch.zeros((), device=device)
    flags: list[Tensor] = []
    for rows in alike:
        flag, one = grads[rows[0]].new_zeros((), dtype=torch.float32), torch.ones((), device=grads[rows[0]].device)
        torch._amp_foreach_non_finite_check_and_unscale_([grads[i] for i in rows], flag, one)
        flags.append(flag.to(device))
    return torch.stack(flags).amax()


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
            scale = float(scale) if _reads_scalars(first.device) else scale.to(first.device)
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
    if _reads_scalars(norm.device):
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
        scale = torch.where(_mask(draw, position, weight), scale, 0.0)
    eps = grad.to(wide) * (scale.to(wide) if isinstance(scale, Tensor) else scale)
    if isinstance(scale, Tensor):
        eps = torch.where(scale == 0, 0.0, eps)
    if eta is not None:
        t = w.abs().add_(eta)
        eps = eps * t * t
    if draw is not None and draw.keep is not None and not draw.whole:
        eps = torch.where(_mask(draw, position, weight), eps, 0)
    moved = w + eps
    if draw is not None and draw.rounding and weight.dtype in (torch.float16, torch.bfloat16):
        moved = _round_stochastically(moved, weight.dtype, _words(draw, position, weight))
    weight.copy_(torch.where(scale == 0, w, moved) if isinstance(scale, Tensor) else moved)


def _words(draw: Draw, position: int, like: Tensor) -> Tensor:
    """The random words of one tensor, int64 in its shape, counted in its memory order."""
    index, start = (column[position] for column in draw.addresses())
    words = philox.words(like.numel(), index, _step(draw), draw.seed, start=start, device=like.device)
    placed = torch.empty_like(like, dtype=torch.int64)
    if is_dense(placed):
        in_memory_order(placed).copy_(words)
        return placed
    return words.view(like.shape)


def _mask(draw: Draw, position: int, like: Tensor) -> Tensor:
    """Which elements are kept, in the tensor's shape; 0-dim where one draw decides on all of them."""
    limit = philox.threshold(1.0 if draw.keep is None else draw.keep[position])
    if draw.whole:
        return philox.words(1, draw.indices[position], _step(draw), draw.seed, device=like.device)[0] < limit
    return _words(draw, position, like) < limit


def _step(draw: Draw) -> int:
    return draw.step + (0 if draw.advance is None else int(draw.advance))


def _round_stochastically(values: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
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


_LOSSES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_selection(after: Tensor, before: Tensor, k: int) -> None:
    """Raise ValueError unless `select_largest_increase` is defined for these arguments. Reads no loss."""
    if after.dim() != 1 or after.shape != before.shape:
        raise ValueError(
            f"losses must be two vectors of one length, got shapes {tuple(after.shape)} and {tuple(before.shape)}"
        )
    if after.dtype not in _LOSSES or after.dtype != before.dtype:
        raise ValueError(
            "losses must both be float64, float32, float16 or bfloat16, the same one, "
            f"got {after.dtype} and {before.dtype}; convert them"
        )
    if after.device != before.device:
        raise ValueError(f"losses must be on one device, got {after.device} and {before.device}")
    if not isinstance(k, int) or not 1 <= k <= len(after):
        raise ValueError(f"k must be an integer from 1 to the number of losses, {len(after)}, got {k!r}")


@torch.no_grad()
def select_largest_increase(after: Tensor, before: Tensor, k: int) -> Tensor:
    """Return the rows of the k largest after - before, ascending (ESAM's B+, Eq. 6).

    Among equal differences the lower row goes first; a NaN comes after every number. Any number of rows will do.

    Args:
        after: per-sample losses, a vector of float64, float32, float16 or bfloat16; 16-bit differences are float32.
        before: as `after`, in its dtype and on its device.
        k: how many rows, at least 1 and at most all.

    Returns:
        int64 vector of length k.

    Raises:
        ValueError: shapes, dtypes or devices differ, or k is out of range.
    """
    check_selection(after, before, k)
    wide = arithmetic_dtype(after.dtype)
    fall = before.to(wide) - after.to(wide)
    # a device may sort by bits: one kind of zero, one kind of NaN, and that the largest
    fall = torch.where(fall == 0, 0.0, torch.where(fall.isnan(), torch.nan, fall))
    return torch.argsort(fall, stable=True)[:k].sort().values


# at the end, since they build on this module
from fastsam.kernels.reference_restore_step import (  # noqa: E402, F401
    AdamOptions,
    SGDOptions,
    restore_,
    restore_adam_step_,
    restore_sgd_step_,
)
from fastsam.kernels.reference_trajectory_loss import Past, ema_, record_, trajectory_loss  # noqa: E402, F401
