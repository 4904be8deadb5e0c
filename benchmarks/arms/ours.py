"""The arms of the step benchmark: how each takes its step, and where it cannot.

fastsam's own are the rows of `fastsam.methods.METHODS` and their variants; baselines are listed here.
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
from fastsam import ESAM
from fastsam.methods import METHODS as TABLE


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


def ours(problem: Problem, method: str, **options: Any) -> Step:
    """One of fastsam's optimizers, by its row in the table."""
    model, base, scaler = problem.model, problem.base, problem.precision.scaler
    opt = TABLE[method].build(model.parameters(), base.func, model=model, base_options=base.keywords, **options)
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


def with_past(problem: Problem, method: str, **options: Any) -> Step:
    """A loss of fastsam's that remembers samples, by its row, in an epoch whose rows all have a past."""
    options |= {"lag": 1, "start_epoch": 0, "reduction": _reduction(problem)}
    loss: Any = TABLE[method].build_loss(num_samples=problem.n_samples, num_classes=problem.classes, **options)

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


def with_teacher(problem: Problem, method: str, **options: Any) -> Step:
    """A loss of fastsam's that takes the inputs, by its row, with its teacher's forward and average."""
    options |= {"start_epoch": 0, "reduction": _reduction(problem)}
    loss: Any = TABLE[method].build_loss(model=problem.model, **options)
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


class Arm(NamedTuple):
    """One line of the benchmark."""

    build: Callable[[Problem], Step]
    cannot: Mapping[str, str] = {}
    """Why it does not run in a regime or precision."""
    is_ours: bool = True
    """Held to its recorded ratios by the GPU gate."""
    period: int = 1
    """Steps after which it repeats; only whole periods are timed."""
    is_default: bool = True
    """Runs where no arms are named: a method's variants do not."""


_NOT_OURS = {"graph": "not captured: fastsam.graph_step takes fastsam's optimizers and torch's own"}
_THEIRS = {**_NOT_OURS, "fp16": "not run: its second step takes the base's without a GradScaler"}
_RECOMPILES = {"compiled": "not compiled: other gradients are left out in each step; see 'esam, elements'"}
_READS = {"graph": "not captured: the host reads how many rows are above the cut"}
_VMAP = dict.fromkeys(("compiled", "graph"), "not run: torch.func.vmap runs the model as it is")

LOSSES = {("sample_ids",): with_past, ("inputs",): with_teacher}
"""What takes the step with a loss, by what that is called with."""
RECORDED_AS = {"msam": "msam, 4 shards"}
"""Rows of the table whose arm is recorded under a name that says more."""


def own_arm(row: str, variant: str = "default", **instead: Any) -> Arm:
    """Return the arm of a row of the table in one of its variants.

    Args:
        row: its name in `fastsam.methods.METHODS`, of kind "optimizer" or "loss".
        variant: one of the row's.
        **instead: keywords of the constructor in place of those.
    """
    method = TABLE[row]
    options = {**method.options, **method.fixed, **method.variants[variant].options, **instead}
    build: Callable = ours if method.kind == "optimizer" else LOSSES[method.loss_needs]
    cannot: dict[str, str] = {}
    if method.cls is ESAM and options["mask"] == "tensor" and options["beta"] < 1:
        cannot |= _RECOMPILES
    if options.get("strict"):
        cannot |= _READS
    if options.get("execution") == "batched":
        cannot |= _VMAP
    # a LookSAM that is timed over a part of its period would be another one
    period = options.get("k", 1)
    return Arm(partial(build, method=row, **options), cannot, True, period, variant == "default")


def own_arms() -> dict[str, Arm]:
    """Return an arm for each variant of each method of the table, by the names of the row and the variant."""
    return {
        RECORDED_AS.get(row, row) if variant == "default" else f"{row}, {variant}": own_arm(row, variant)
        for row, method in TABLE.items()
        if method.kind != "base"
        for variant in method.variants
    }


def _baseline(build: Callable[[Problem], Step], cannot: Mapping[str, str], period: int = 1) -> Arm:
    return Arm(build, cannot, False, period)


ARMS: dict[str, Arm] = {
    "base": Arm(plain),
    "base again": Arm(plain),
    "base, fused": Arm(partial(plain, fused=True)),
    "davda54 eager sam": _baseline(partial(eager, sam=EagerSAM), _NOT_OURS),
    "torch foreach sam": _baseline(partial(eager, sam=ForeachSAM, foreach=True), _NOT_OURS),
    "pytorch_optimizer sam": _baseline(packages.sam, _THEIRS),
    "pytorch_optimizer gsam": _baseline(packages.gsam, _THEIRS),
    "pytorch_optimizer wsam": _baseline(packages.wsam, _THEIRS),
    "pytorch_optimizer looksam": _baseline(packages.looksam, _THEIRS, packages.LOOK),
    "official-style esam": _baseline(official_esam, {**_RECOMPILES, **_NOT_OURS}),
    "official-style saf": _baseline(official_saf, {"graph": "not captured: logits go to the host and back"}),
    **own_arms(),
}
"""Every arm of the step benchmark, by name: bases, baselines, and fastsam's own."""
