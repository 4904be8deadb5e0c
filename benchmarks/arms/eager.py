"""What users would otherwise run, rewritten as baselines: each in the style of a public code, none of it copied.

The SAMs share the order: backward, `first_step`, zero_grad, backward, `second_step`; or `restore` and the base's step.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Backward = Callable[[Tensor], None]
"""Runs backward from a loss, through a loss scale where there is one."""


class EagerSAM:
    """The optimizer-side work of a davda54-style SAM around `base`; `adaptive` is its ASAM, with T = |w|.

    One small operation per tensor for the norm, the copy, the perturbation and the swap of storages.
    """

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
    def restore(self) -> None:
        for p in self.params:
            p.data = self.old[p]

    def second_step(self) -> None:
        self.restore()
        self.base.step()


class ForeachSAM:
    """SAM composed of torch's foreach operations: no kernel of its own, no host read, storages stay where they are."""

    def __init__(self, params: Sequence[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        self.params, self.base, self.rho = list(params), base, rho
        self.old = [torch.empty_like(p) for p in self.params]

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in self.params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_copy_(self.old, self.params)
        torch._foreach_add_(self.params, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.params, self.old)


class OfficialESAM:
    """ESAM in the style of its authors' code: three forwards in train mode, and rows chosen by a dynamic shape.

    The mask of a step is drawn at the end of the one before, so that the first perturbs all; rows strictly above the
    smallest of the k largest deltas are chosen, whose number the host has to read.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        e0: float = 1e-7,
    ) -> None:
        self.params, self.base, self.rho, self.beta, self.gamma, self.e0 = list(params), base, rho, beta, gamma, e0
        self.kept = [True] * len(self.params)
        self.old: dict[Tensor, Tensor] = {}

    def passes(self, losses: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, backward: Backward) -> None:
        """Leave the step's gradient and the weights at which it is to be taken; `losses` are per sample."""
        for p, kept in zip(self.params, self.kept, strict=True):
            p.requires_grad_(kept)
        before = losses(x, y)
        if any(self.kept):
            backward(before.mean())
        self._perturb()
        with torch.no_grad():
            delta = losses(x, y) - before.detach()
        cut = delta.topk(int(len(x) * self.gamma)).values[-1]
        rows = (delta > cut).nonzero().squeeze(1)
        self.base.zero_grad()
        backward(losses(x[rows], y[rows]).mean())
        for p in self.old:
            p.data = self.old[p]
        self.kept = (torch.rand(len(self.params)) <= self.beta).tolist()

    @torch.no_grad()
    def _perturb(self) -> None:
        self.old = {}
        grads = {p: p.grad for p in self.params if p.grad is not None}
        if grads:
            scale = self.rho / self.beta / (torch.stack([g.norm(p=2) for g in grads.values()]).norm(p=2) + self.e0)
        for p in self.params:
            p.requires_grad_(True)
            if p in grads:
                self.old[p] = p.data.clone()
                p.add_(grads[p] * scale)


class OfficialSAF:
    """SAF's loss in the style of its authors' code: logits go to an array on the host, and the past comes back from it.

    They are recorded before the past is read, which takes one slot more than `lag`.
    """

    def __init__(
        self,
        n_samples: int,
        classes: int,
        lag: int,
        lam: float = 0.3,
        tau: float = 5.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.past = torch.zeros(lag + 1, n_samples, classes, dtype=dtype)
        self.lag, self.lam, self.tau, self.epoch = lag, lam, tau, 1

    def __call__(self, logits: Tensor, y: Tensor, host_ids: Tensor) -> Tensor:
        self.past[self.epoch % (self.lag + 1), host_ids] = logits.detach().to(self.past)
        past = self.past[(self.epoch - self.lag) % (self.lag + 1), host_ids].to(logits.device)
        q, p = (logits / self.tau).softmax(1), (past / self.tau).softmax(1)
        divergence = (p * (p.log() - q.log())).sum(1).mean()
        return F.cross_entropy(logits, y) + self.lam * self.tau**2 * divergence
