"""What the reference implementations share: the dtype of arithmetic, whether scalars are read, and random masks.

On the CPU a scalar such as the gradient norm is read as a Python number (that costs nothing there and lets one foreach
call do the work); elsewhere, or where `READ_SCALARS` is off, it stays a tensor and nothing waits for the device.
"""

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor

from fastsam.kernels import philox
from fastsam.kernels.philox import Draw
from fastsam.kernels.tensor_list import in_memory_order, is_dense

READ_SCALARS = True
"""Whether scalars on the CPU are read; off, the CPU does what another device would."""

place: Callable[[Tensor], tuple[torch.device, torch.dtype]] = attrgetter("device", "dtype")
"""Where a tensor lies and its dtype: what tensors of one foreach call have to share."""


def reads_scalars(device: torch.device) -> bool:
    """Whether a scalar on this device is read as a Python number."""
    return READ_SCALARS and device.type == "cpu"


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic runs in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_words(draw: Draw, position: int, like: Tensor) -> Tensor:
    """The random words of one tensor, int64 in its shape, counted in its memory order."""
    index, start = (column[position] for column in draw.addresses())
    words = philox.words(like.numel(), index, _step(draw), draw.seed, start=start, device=like.device)
    placed = torch.empty_like(like, dtype=torch.int64)
    if is_dense(placed):
        in_memory_order(placed).copy_(words)
        return placed
    return words.view(like.shape)


def mask_of(draw: Draw, position: int, like: Tensor) -> Tensor:
    """Which elements are kept, in the tensor's shape; 0-dim where one draw decides on all of them."""
    limit = philox.threshold(1.0 if draw.keep_probability is None else draw.keep_probability[position])
    if draw.whole:
        return philox.words(1, draw.indices[position], _step(draw), draw.seed, device=like.device)[0] < limit
    return random_words(draw, position, like) < limit


def _step(draw: Draw) -> int:
    return draw.step + (0 if draw.advance is None else int(draw.advance))
