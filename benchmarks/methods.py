"""The methods that `benchmarks.step` times: how each takes its step, and where it cannot.

A new method is one more line of `METHODS`.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.eager_methods import EagerSAM, ForeachSAM, OfficialESAM, OfficialSAF
from benchmarks.models import Batch
from fastsam import ESAM, MESA, MSAM, SAF, SAM

RHO = 0.05
Step = Callable[[Batch], Any]


class Precision:
    """Autocast, and for fp16 a loss scale."""

    def __init__(self, amp: str, device: str) -> None:
        self.device, self.dtype = device, {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self.scaler = torch.amp.GradScaler(device) if amp == "fp16" else None

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, self.dtype) if self.dtype else nullcontext()

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, opt: torch.optim.Optimizer) -> None:
        if self.scaler:
            self.scaler.step(opt)
            self.scaler.update()
        else:
            opt.step()


class Problem(NamedTuple):
    """What a method takes its steps on."""

    model: nn.Module
    base: partial
    """The base optimizer, without its parameters."""
    batches: list[Batch]
    """An epoch, for what remembers samples."""
    classes: int
    precision: Precision
    capture: Callable | None = None
    """`fastsam.graph_step`, where the whole step is to be one CUDA graph."""
    compile: Callable[[nn.Module], None] | None = None
    """Compiles a module in place, where the model is compiled."""

    @property
    def n_samples(self) -> int:
        return sum(len(batch.y) for batch in self.batches)

    def losses(self, x: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        with self.precision.autocast():
            return F.cross_entropy(self.model(x), y, reduction=reduction)


def single_pass(problem: Problem, opt: torch.optim.Optimizer, loss_of: Callable[[Tensor, Batch], Tensor]) -> Step:
    """One forward and backward: `loss_of(logits, batch)` is a mean, or per sample where the step is captured."""
    precision = problem.precision

    def loss(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        with precision.autocast():
            return loss_of(problem.model(x), Batch(x, y, ids, ids))

    if problem.capture:
        captured = problem.capture(opt, loss, *problem.batches[0][:3], scaler=precision.scaler)
        return lambda batch: captured(*batch[:3])

    def step(batch: Batch) -> None:
        opt.zero_grad()
        with precision.autocast():
            loss = loss_of(problem.model(batch.x), batch)
        precision.backward(loss)
        precision.step(opt)

    return step


def _reduction(problem: Problem) -> Any:
    return "none" if problem.capture else "mean"


def plain(problem: Problem, **options: Any) -> Step:
    """The base optimizer, and nothing else."""
    reduction = _reduction(problem)
    opt = problem.base(problem.model.parameters(), **options)
    return single_pass(problem, opt, lambda z, batch: F.cross_entropy(z, batch.y, reduction=reduction))


def ours(problem: Problem, method: Callable, **options: Any) -> Step:
    """One of fastsam's optimizers."""
    model, base, scaler = problem.model, problem.base, problem.precision.scaler
    opt = method(model.parameters(), base.func, rho=RHO, model=model, **options, **base.keywords)
    if problem.capture:
        captured = problem.capture(opt, problem.losses, *problem.batches[0][:2], scaler=scaler)
        return lambda batch: captured(batch.x, batch.y)

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


def _package() -> ModuleType:
    import pytorch_optimizer

    return pytorch_optimizer


def _closure(problem: Problem, batch: Batch) -> Tensor:
    loss = problem.losses(batch.x, batch.y, "mean")
    loss.backward()
    return loss


def kozistr_sam(problem: Problem) -> Step:
    """SAM of pytorch_optimizer, whose `step` wants the first gradient to be there already."""
    opt = _package().SAM(problem.model.parameters(), problem.base.func, rho=RHO, **problem.base.keywords)

    def step(batch: Batch) -> None:
        _closure(problem, batch)
        opt.step(partial(_closure, problem, batch))
        opt.zero_grad()

    return step


def kozistr_gsam(problem: Problem) -> Step:
    """GSAM of pytorch_optimizer at a constant rho; its `step` runs both passes and expects each to clear gradients."""
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


def kozistr_wsam(problem: Problem) -> Step:
    """WSAM of pytorch_optimizer, decoupled as by default; its `step` runs both passes, and clears between them."""
    opt = _package().WSAM(
        problem.model, problem.model.parameters(), problem.base.func, rho=RHO, **problem.base.keywords
    )

    def step(batch: Batch) -> None:
        opt.step(partial(_closure, problem, batch))
        opt.zero_grad()

    return step


LOOK = 5
"""Steps from one of LookSAM's perturbations to the next."""


def kozistr_looksam(problem: Problem) -> Step:
    """LookSAM of pytorch_optimizer; its `step(closure)` would run two passes in every step, and so is not used."""
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


_NOT_OURS = "not captured: fastsam.graph_step takes fastsam's optimizers and torch's own"
_THEIRS = {"graph": _NOT_OURS, "fp16": "not run: its second step takes the base's without a GradScaler"}
_BY_TENSORS = "other gradients are left out in each step; see 'esam, element mask'"
_RECOMPILES = {"compiled": f"not compiled: {_BY_TENSORS}", "graph": f"not captured: {_BY_TENSORS}"}


class Method(NamedTuple):
    """One line of the benchmark."""

    build: Callable[[Problem], Step]
    cannot: Mapping[str, str] = {}
    """Why it does not run in a regime or precision."""
    is_ours: bool = True
    """Held to its recorded ratios by `benchmarks.gpu_gate`."""
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
    "pytorch_optimizer sam": _baseline(kozistr_sam, _THEIRS),
    "pytorch_optimizer gsam": _baseline(kozistr_gsam, _THEIRS),
    "pytorch_optimizer wsam": _baseline(kozistr_wsam, _THEIRS),
    "pytorch_optimizer looksam": _baseline(kozistr_looksam, _THEIRS, LOOK),
    "official-style esam": _baseline(official_esam, _RECOMPILES),
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
