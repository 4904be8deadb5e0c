"""What users would otherwise run: SAM in the eager style of github.com/davda54/sam, rewritten as a baseline.

One small operation per tensor for the norm, the copy, the perturbation and the swap of storages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class EagerSAM:
    """The optimizer-side work of a davda54-style SAM around `base`; `adaptive` is its ASAM, with T = |w|."""

    def __init__(
        self,
        params: Sequence[Tensor],
        base: torch.optim.Optimizer | None = None,
        rho: float = 0.05,
        adaptive: bool = False,
    ) -> None:
        self.params, self.base, self.rho, self.adaptive = params, base, rho, adaptive
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def norm(self) -> Tensor:
        return torch.norm(
            torch.stack([((torch.abs(p) if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.params]), p=2
        )

    @torch.no_grad()
    def perturb(self, norm: Tensor) -> None:
        scale = self.rho / (norm + 1e-12)
        for p in self.params:
            self.old[p] = p.data.clone()
            p.add_((torch.pow(p, 2) if self.adaptive else 1.0) * p.grad * scale)

    def first_step(self) -> None:
        self.perturb(self.norm())

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            p.data = self.old[p]
        self.base.step()
