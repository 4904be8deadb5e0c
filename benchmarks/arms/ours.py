"""The methods that `benchmarks.steps.run` times: how each takes its step, and where it cannot.

A new method is one more line of `METHODS`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arms import packages
from benchmarks.arms.eager import EagerSAM, ForeachSAM, OfficialESAM, OfficialSAF
from benchmarks.arms.tasks import RHO, Batch, Problem, Step
from fastsam import ESAM, MESA, MSAM, SAF, SAM


def single_pass(problem: Problem, opt: torch.optim.Optimizer, loss_of: Callable[[Tensor, Batch], Tensor]) -> Step:
    """One forward and backward: `loss_of(logits, batch)` is a mean, or per sample where the step is captured."""
    precision = problem.precision

    def loss(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        with precision.autocast():
            return loss_of(problem.model(x), Batch(x, y, ids, ids))

    if problem.is_captured:
        return problem.capture(opt, loss, parts=3)

    def step(batch: Batch) -> None:
        opt.zero_grad()
        with precision.autocast():
            loss = loss_of(problem.model(batch.x), batch)
        precision.backward(loss)
        precision.step(opt)

    return step


def _reduction(problem: Problem) -> Any:
    return "none" if problem.is_captured else "mean"


def plain(problem: Problem, **options: Any) -> Step:
    """The base optimizer, and nothing else."""
    reduction = _reduction(problem)
    opt = problem.base(problem.model.parameters(), **options)
    return single_pass(problem, opt, lambda z, batch: F.cross_entropy(z, batch.y, reduction=reduction))


def ours(problem: Problem, method: Callable, **options: Any) -> Step:
    """One of fastsam's optimizers."""
    model, base, scaler = problem.model, problem.base, problem.precision.scaler
    opt = method(model.parameters(), base.func, rho=RHO, model=model, **options, **base.keywords)
    if problem.is_captured:
        return problem.capture(opt, problem.losses, parts=2)

    def step(batch: Batch) -> None:
        opt.step(problem.losses, batch.x, batch.y, scaler=scaler)
        if scaler:
            scaler.update()

    return step


def _by_epochs(problem: Problem, loss_of: Callable[[Tensor, Batch], Tensor], begin: Callable[[int], None]) -> Step:
    """Let epochs pass under a loss of trajectories, from the second on: every row has a past, of random logits."""
    begin(1)
    for batch in problem.batches:
        loss_of(torch.randn(len(batch.y), problem.classes, device=batch.y.device), batch)
    begin(2)
    step, taken = single_pass(problem, problem.base(problem.model.parameters()), loss_of), 0

    def counted(batch: Batch) -> None:
        nonlocal taken
        if taken and taken % len(problem.batches) == 0:
            begin(2 + taken // len(problem.batches))
        taken += 1
        step(batch)

    return counted


def saf(problem: Problem, **options: Any) -> Step:
    """SAF in an epoch whose rows all have a past."""
    loss = SAF(problem.n_samples, problem.classes, lag=1, start_epoch=0, reduction=_reduction(problem), **options)

    def loss_of(z: Tensor, batch: Batch) -> Tensor:
        return loss(z, batch.y, batch.ids)

    return _by_epochs(problem, loss_of, loss.set_epoch)


def official_saf(problem: Problem) -> Step:
    """SAF in the style of its authors' code."""
    loss = OfficialSAF(problem.n_samples, problem.classes, lag=1)

    def loss_of(z: Tensor, batch: Batch) -> Tensor:
        return loss(z, batch.y, batch.host_ids)

    def begin(epoch: int) -> None:
        loss.epoch = epoch

    return _by_epochs(problem, loss_of, begin)


def mesa(problem: Problem, **options: Any) -> Step:
    """MESA with its teacher's forward and average."""
    loss = MESA(problem.model, start_epoch=0, reduction=_reduction(problem), **options)
    if problem.compile:
        problem.compile(loss.teacher)
    opt = problem.base(problem.model.parameters())
    loss.attach(opt)
    return single_pass(problem, opt, lambda z, batch: loss(z, batch.y, batch.x))


def eager(problem: Problem, sam: Callable, **options: Any) -> Step:
    """A SAM in two calls around torch's own optimizer."""
    params, precision = list(problem.model.parameters()), problem.precision
    base = problem.base(params, **options)
    opt = sam(params, base, rho=RHO)

    def step(batch: Batch) -> None:
        precision.backward(problem.losses(batch.x, batch.y, "mean"))
        opt.first_step()
        base.zero_grad()
        precision.backward(problem.losses(batch.x, batch.y, "mean"))
        opt.restore()
        precision.step(base)
        base.zero_grad()

    return step


def official_esam(problem: Problem) -> Step:
    """ESAM in the style of its authors' code."""
    params, precision = list(problem.model.parameters()), problem.precision
    base = problem.base(params)
    opt = OfficialESAM(params, base, rho=RHO)

    def step(batch: Batch) -> None:
        opt.passes(problem.losses, batch.x, batch.y, precision.backward)
        precision.step(base)
        base.zero_grad()

    return step


_NOT_OURS = "not captured: fastsam.graph_step takes fastsam's optimizers and torch's own"
_THEIRS = {"graph": _NOT_OURS, "fp16": "not run: its second step takes the base's without a GradScaler"}
_RECOMPILES = {"compiled": "not compiled: other gradients are left out in each step; see 'esam, element mask'"}


class Method(NamedTuple):
    """One line of the benchmark."""

    build: Callable[[Problem], Step]
    cannot: Mapping[str, str] = {}
    """Why it does not run in a regime or precision."""
    is_ours: bool = True
    """Held to its recorded ratios by `benchmarks.gates.gpu`."""
    period: int = 1
    """Steps after which it repeats; only whole periods are timed."""


def _baseline(build: Callable[[Problem], Step], cannot: Mapping[str, str], period: int = 1) -> Method:
    return Method(build, cannot, False, period)


_ESAM = partial(ours, method=ESAM)
METHODS: dict[str, Method] = {
    "base": Method(plain),
    "base again": Method(plain),
    "base, fused": Method(partial(plain, fused=True)),
    "davda54 eager sam": _baseline(partial(eager, sam=EagerSAM), {"graph": _NOT_OURS}),
    "torch foreach sam": _baseline(partial(eager, sam=ForeachSAM, foreach=True), {"graph": _NOT_OURS}),
    "pytorch_optimizer sam": _baseline(packages.sam, _THEIRS),
    "pytorch_optimizer gsam": _baseline(packages.gsam, _THEIRS),
    "pytorch_optimizer wsam": _baseline(packages.wsam, _THEIRS),
    "pytorch_optimizer looksam": _baseline(packages.looksam, _THEIRS, packages.LOOK),
    "official-style esam": _baseline(official_esam, {**_RECOMPILES, "graph": _NOT_OURS}),
    "official-style saf": _baseline(official_saf, {"graph": "not captured: logits go to the host and back"}),
    "sam": Method(partial(ours, method=SAM)),
    "esam": Method(partial(_ESAM, beta=0.6, gamma=0.5), _RECOMPILES),
    "esam, element mask": Method(partial(_ESAM, beta=0.6, gamma=0.5, mask="element")),
    "esam, reuse": Method(partial(_ESAM, beta=0.6, gamma=0.5, selection="reuse"), _RECOMPILES),
    "esam, perturbation only": Method(partial(_ESAM, beta=0.6, gamma=1.0), _RECOMPILES),
    "esam, selection only": Method(partial(_ESAM, beta=1.0, gamma=0.5)),
    "msam, 4 shards": Method(partial(ours, method=MSAM, num_shards=4)),
    "saf": Method(saf),
    "mesa": Method(mesa),
    "mesa, bf16 teacher": Method(partial(mesa, teacher_dtype=torch.bfloat16)),
}
