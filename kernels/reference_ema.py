"""Reference implementation of exponential moving averages of a list of tensors."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastsam.kernels.calls import Call, run_all
from fastsam.kernels.reference_common import reads_scalars
from fastsam.kernels.tensor_list import buckets


def ema_(averages: Sequence[Tensor], values: Sequence[Tensor], decay: float, found_inf: Tensor | None) -> None:
    """Move the averages; see `ops.ema_`."""
    run_all(ema_calls(averages, values, decay, found_inf))


def ema_calls(
    averages: Sequence[Tensor], values: Sequence[Tensor], decay: float, found_inf: Tensor | None
) -> list[Call]:
    """Return the calls that move the averages, as v + (1 - decay)(w - v), which keeps v = w; see `ops.ema_`."""
    if found_inf is not None and reads_scalars(found_inf.device):
        if bool(found_inf):
            return []
        found_inf = None
    calls: list[Call] = []
    keys = ((v.device, v.dtype, w.dtype) for v, w in zip(averages, values, strict=True))
    for positions in buckets(keys):
        v, w = [averages[i] for i in positions], [values[i] for i in positions]
        wide = torch.promote_types(torch.promote_types(v[0].dtype, w[0].dtype), torch.float32)
        moved = [t.to(wide, copy=found_inf is not None) for t in v]
        move = partial(torch._foreach_lerp_, moved, [t.to(wide) for t in w], 1 - decay)
        if moved[0] is v[0]:
            calls.append(move)
            continue
        move()
        if found_inf is not None:
            skipped = found_inf.to(v[0].device) != 0
            moved = [torch.where(skipped, old, new) for old, new in zip(v, moved, strict=True)]
        calls.append(partial(torch._foreach_copy_, v, moved))
    return calls
