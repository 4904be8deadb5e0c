"""Random directions in the space of the weights, scaled filter by filter as the weights are (Li et al. 2018)."""

from collections.abc import Sequence

import torch
from torch import Tensor

Direction = list[Tensor]
"""One tensor for each parameter, of its shape and device, at least float32."""
_NOTHING_LEFT = 1e-6
"""Of a filter's length: what remains below it, after a filter was made orthogonal to another, is rounding."""


def orthogonal_pair(params: Sequence[Tensor], seed: int, scale_vectors: bool = False) -> tuple[Direction, Direction]:
    """Return two directions that are orthogonal in every filter, each filter as long as the weights' own.

    A filter is what one index of a tensor's first dimension selects: the weights of one output. The random numbers do
    not depend on the weights, so that models of one architecture get the same ones, each scaled to itself.

    Args:
        params: the weights.
        seed: of the Gaussian numbers, drawn on the CPU.
        scale_vectors: whether tensors of less than two dimensions (biases, the weights of norms) move too, each as one
            filter; else they stay, as in the paper's pictures.

    Returns:
        Both directions. Where a filter has a single entry nothing is orthogonal to it, and the second one is zero.

    Paper: Li et al. 2018 (https://arxiv.org/abs/1712.09913), section 4.
    """
    generator = torch.Generator().manual_seed(seed)
    first: Direction = []
    second: Direction = []
    for p in params:
        # both are drawn whatever becomes of them, so that each tensor's numbers are its own
        d1, d2 = torch.randn(2, *p.shape, generator=generator, dtype=torch.float64)
        if p.dim() < 2 and not scale_vectors:
            d1, d2 = torch.zeros_like(d1), torch.zeros_like(d2)
        weights = _filters(p.detach().cpu().double())
        rows1, rows2 = _filters(d1), _filters(d2)
        rows1 = _scaled(rows1, weights)
        share = (rows1 * rows2).sum(1, keepdim=True) / rows1.square().sum(1, keepdim=True).clamp_min(1e-300)
        rest = rows2 - share * rows1
        keeps = rest.norm(dim=1, keepdim=True) > _NOTHING_LEFT * rows2.norm(dim=1, keepdim=True)
        rows2 = _scaled(torch.where(keeps, rest, 0.0), weights)
        wide = torch.promote_types(p.dtype, torch.float32)
        first.append(rows1.view(p.shape).to(p.device, wide))
        second.append(rows2.view(p.shape).to(p.device, wide))
    return first, second


def _filters(tensor: Tensor) -> Tensor:
    """Return a tensor as [filters, entries of each]; a vector is one filter."""
    return tensor.flatten(1) if tensor.dim() >= 2 else tensor.reshape(1, -1)


def _scaled(rows: Tensor, weights: Tensor) -> Tensor:
    """Return rows that are as long as those of the weights; rows of zeros stay."""
    lengths = rows.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, rows * (weights.norm(dim=1, keepdim=True) / lengths.clamp_min(1e-300)), 0.0)
