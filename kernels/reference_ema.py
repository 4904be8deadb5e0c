"""Reference implementation of exponential moving averages of a list of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.kernels.reference_common import reads_scalars
from fastsam.kernels.tensor_list import buckets


@torch.no_grad()
def ema_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float, found_inf: Tensor | None = None) -> None:
    """Set each average v to decay v + (1 - decay) w (SPEC Eq. 10), as v + (1 - decay)(w - v), which keeps v = w.

    Args:
        averages: floating tensors to update in place; computed in float64 where either side is, else in float32.
        values: tensors of the same shapes on the same devices, of any floating dtypes.
        decay: from 0 to 1.
        found_inf: 0-dim tensor; where it is not 0 the averages stay as they are.

    Raises:
        ValueError: decay is out of range.
    """
    check_decay(decay)
    if found_inf is not None and reads_scalars(found_inf.device):
        if bool(found_inf):
            return
        found_inf = None
    keys = ((v.device, v.dtype, w.dtype) for v, w in zip(averages, values, strict=True))
    for rows in buckets(keys):
        v, w = [averages[i] for i in rows], [values[i] for i in rows]
        wide = torch.promote_types(torch.promote_types(v[0].dtype, w[0].dtype), torch.float32)
        moved = [t.to(wide, copy=found_inf is not None) for t in v]
        torch._foreach_lerp_(moved, [t.to(wide) for t in w], 1 - decay)
        if found_inf is not None:
            skipped = found_inf.to(v[0].device) != 0
            moved = [torch.where(skipped, old, new) for old, new in zip(v, moved, strict=True)]
        if moved[0] is not v[0]:
            torch._foreach_copy_(v, moved)


def check_decay(decay: float) -> None:
    """Raise ValueError unless an average with this decay is one."""
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be from 0 to 1, got {decay}")
