"""SAM and its relatives of the pytorch_optimizer package, each used as its code wants it (read in version 4.1.0)."""

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.arms.tasks import RHO, Batch, Problem, Step


def _package() -> ModuleType:
    import pytorch_optimizer

    return pytorch_optimizer


def _closure(problem: Problem, batch: Batch) -> Tensor:
    loss = problem.losses(batch.x, batch.y, "mean")
    loss.backward()
    return loss


def sam(problem: Problem) -> Step:
    """SAM, whose `step` wants the first gradient to be there already."""
    opt = _package().SAM(problem.model.parameters(), problem.base.func, rho=RHO, **problem.base.keywords)

    def step(batch: Batch) -> None:
        _closure(problem, batch)
        opt.step(partial(_closure, problem, batch))
        opt.zero_grad()

    return step


def gsam(problem: Problem) -> Step:
    """GSAM at a constant rho; its `step` runs both passes and expects each to clear gradients."""
    package, base = _package(), problem.base(problem.model.parameters())
    rate = problem.base.keywords["lr"]
    constant = package.ProportionScheduler(
        torch.optim.lr_scheduler.LambdaLR(base, lambda epoch: 1.0), rate, rate, max_value=RHO, min_value=RHO
    )
    opt = package.GSAM(problem.model.parameters(), base, problem.model, constant, alpha=0.4)

    def step(batch: Batch) -> None:
        def both() -> tuple[None, Tensor]:
            base.zero_grad()
            with torch.enable_grad():
                return None, _closure(problem, batch)

        opt.step(both)

    return step


def wsam(problem: Problem) -> Step:
    """WSAM, decoupled as by default; its `step` runs both passes, and clears between them."""
    opt = _package().WSAM(
        problem.model, problem.model.parameters(), problem.base.func, rho=RHO, **problem.base.keywords
    )

    def step(batch: Batch) -> None:
        opt.step(partial(_closure, problem, batch))
        opt.zero_grad()

    return step


LOOK = 5
"""Steps from one of LookSAM's perturbations to the next."""


def looksam(problem: Problem) -> Step:
    """LookSAM; its `step(closure)` would run two passes in every step, and so is not used."""
    opt = _package().LookSAM(
        problem.model.parameters(), problem.base.func, rho=RHO, k=LOOK, alpha=0.7, **problem.base.keywords
    )

    def step(batch: Batch) -> None:
        _closure(problem, batch)
        if opt.get_step() % LOOK == 0:
            opt.first_step(zero_grad=True)
            _closure(problem, batch)
        opt.second_step(zero_grad=True)

    return step
