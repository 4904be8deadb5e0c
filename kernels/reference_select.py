"""Reference implementation of the selection of the rows whose loss rose most."""

import torch
from torch import Tensor

from fastsam.kernels.reference_common import arithmetic_dtype


def select_largest_increase(after: Tensor, before: Tensor, k: int) -> Tensor:
    """Return the rows of the k largest after - before, ascending; see `ops.select_largest_increase`."""
    wide = arithmetic_dtype(after.dtype)
    fall = before.to(wide) - after.to(wide)
    # A device may sort by bits, so there has to be one zero alone, and one NaN, the largest of all.
    fall = torch.where(fall == 0, 0.0, torch.where(fall.isnan(), torch.nan, fall))
    return torch.argsort(fall, stable=True)[:k].sort().values
