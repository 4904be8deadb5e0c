"""Reference implementation of the selection of the rows whose loss rose most."""

import torch
from torch import Tensor

from fastsam.kernels.reference_common import arithmetic_dtype

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
