"""The passes of one step: what is set aside around each, and how everything is put back whatever happens."""

import enum
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.distributed.ddp import Replicas
from fastsam.kernels import ops
from fastsam.kernels.tensor_list import Backup
from fastsam.two_pass.gradients import ConsumedMark, clear, copies, flat, put, take
from fastsam.two_pass.module_state import RunningStatistics
from fastsam.two_pass.rng import RandomState


class Stage(enum.Enum):
    """Where a step is."""

    IDLE = "between steps"
    ASCENT = "inside ascent()"
    ASCENDED = "after ascent(), before its descent()"
    DESCENT = "inside descent()"
    FIRST = "after first_step(), before second_step()"


_runs: "weakref.WeakSet[Run]" = weakref.WeakSet()


def under_way() -> "Run | None":
    """Return the run of the optimizer that is in the middle of a step, for losses that treat its passes differently."""
    return next((run for run in _runs if run.stage is not Stage.IDLE), None)


def found_inf_of(optimizer: Any) -> Tensor | None:
    """Return a 0-dim tensor that is not 0 if the step that is just over was skipped; None if nobody has looked."""
    run = getattr(optimizer, "_run", None)
    return run.found_inf if isinstance(run, Run) else getattr(optimizer, "found_inf", None)  # as GradScaler says it


class Run:
    """The state of a step that is under way, and the way into and out of its passes.

    One object, because frameworks make proxies of an optimizer that share its attributes but not later assignments.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], model: nn.Module | None, replicas: Replicas) -> None:
        self.stage = Stage.IDLE
        self.failed = False
        self.pairs = 0
        self.in_second_step = False
        self.warned_about_base_step = False
        self.params: list[Tensor] = []
        self.aside: list[Tensor | None] | None = None
        self.ascent_grads: list[Tensor | None] = []
        self.frozen: list[Tensor] = []
        self.backup = Backup([])
        self.replicas = replicas
        self.ascent_is_local = False
        self.unreduced = ExitStack()
        self.statistics = RunningStatistics(model)
        self.first_draws: RandomState | None = None
        self.later_draws: RandomState | None = None
        self.consumed = ConsumedMark()
        self.last_grad_norm: Tensor | None = None
        device = next((p.device for p in flat(groups)), torch.device("cpu"))
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.found_inf: Tensor | None = None
        self.at_end: list[Callable[[], None]] = []
        _runs.add(self)

    def finish(self) -> None:
        """The step has been taken: do what waited for it."""
        self.pairs, self.stage = 0, Stage.IDLE
        at_end, self.at_end = self.at_end, []
        for call in at_end:
            call()

    def refuse(self, call: str, *stages: Stage) -> None:
        """Raise RuntimeError if the step is in one of these stages."""
        if self.stage in stages:
            raise RuntimeError(f"{call} cannot be called {self.stage.value}; {_WAYS_OUT[self.stage]}")

    def require(self, call: str, stage: Stage) -> None:
        """Raise RuntimeError unless the step is in this stage and no pass of it has failed."""
        if self.failed:
            raise RuntimeError(f"{call} after a failed pass; call zero_grad() and start the step again")
        if self.stage is not stage:
            way_out = _WAYS_IN[stage] if self.stage is Stage.IDLE else _WAYS_OUT[self.stage]
            raise RuntimeError(f"{call} cannot be called {self.stage.value}; {way_out}")

    def enter_ascent(self, groups: Sequence[dict[str, Any]], same_rng: bool, is_local: bool = False) -> None:
        """Set p.grad aside, so that the backward that follows leaves the ascent gradient alone in it.

        Args:
            groups: the optimizer's parameter groups.
            same_rng: keep the state of the random number generators for the second pass.
            is_local: keep this rank's gradient unreduced; `Replicas.average` is left to do.
        """
        self.params = flat(groups)
        overwrites = self.replicas.overwrites_gradients(unreduced=is_local)
        if not self.pairs and self.consumed.covers(groups) and (overwrites or not self.consumed.zeroed):
            clear(self.params)  # leftovers of the last step
        self.first_draws = RandomState({p.device for p in self.params}) if same_rng else None
        self.aside = copies(self.params) if overwrites else take(self.params)
        self.stage = Stage.ASCENT
        clear(self.params)
        self.ascent_is_local = is_local
        if is_local:
            self.unreduced.enter_context(self.replicas.no_sync())

    def freeze(self, params: Sequence[Tensor]) -> None:
        """Switch off requires_grad until the ascent is left, so that no work goes into these gradients."""
        self.frozen = [p for p in params if p.requires_grad]
        for p in self.frozen:
            p.requires_grad_(False)

    def unfreeze(self) -> None:
        """Undo `freeze`. Idempotent."""
        for p in self.frozen:
            p.requires_grad_(True)
        self.frozen = []

    def leave_ascent(self) -> None:
        """Keep the ascent gradient and put p.grad back."""
        self.unreduced.close()
        self.unfreeze()
        self.ascent_grads = take(self.params)
        put(self.params, self.aside or [])
        self.aside = None
        self.stage = Stage.ASCENDED

    def enter_descent(self, perturb: Callable[[list[Tensor], list[Tensor | None]], None], sync: bool = True) -> None:
        """Perturb the weights and rewind the random draws, for a second pass whose traces are wiped afterwards.

        Args:
            perturb: perturbs weights along gradients.
            sync: reduce the pass's gradients between DDP's ranks; without, a later pass does it for both.
        """
        self.statistics.save()
        self.stage = Stage.DESCENT
        perturb(self.params, self.ascent_grads)
        torch.clear_autocast_cache()  # an autocast around the step would go on with casts of the other weights
        self.ascent_grads = []
        self.replicas.reshard()
        if not sync:
            self.unreduced.enter_context(self.replicas.no_sync())
        if self.first_draws is not None:
            self.later_draws = RandomState({p.device for p in self.params})
            self.first_draws.set()

    def replay_draws(self) -> None:
        """Rewind the random draws once more, for another forward in the second pass."""
        if self.first_draws is not None:
            self.first_draws.set()

    def use_ascent_gradient(self) -> None:
        """Let the ascent gradient be the step's: nothing was perturbed, so a second pass would only repeat it."""
        put(self.params, self.ascent_grads)
        self.leave_descent()

    def leave_descent(self) -> None:
        """Wipe the second pass's traces; the weights stay perturbed until they are restored."""
        self.unreduced.close()
        self.statistics.put_back()
        torch.clear_autocast_cache()
        if self.later_draws is not None:
            self.later_draws.set()
        self.later_draws = self.first_draws = None
        self.ascent_grads = []

    def clear_aside(self, set_to_none: bool) -> None:
        """Clear the gradients that were set aside."""
        for grad in self.aside or ():
            if grad is not None and not set_to_none:
                grad.zero_()
        if set_to_none and self.aside is not None:
            self.aside = [None] * len(self.aside)

    def backup_of(self, weights: list[Tensor]) -> Backup:
        """Return scratch for copies of these weights: the last step's, if it fits."""
        if not self.backup.fits(weights):
            self.backup = Backup(weights)
        return self.backup

    def restore(self) -> None:
        """Bring the weights back, bit for bit. Idempotent."""
        if self.backup.valid:
            ops.pick(self.backup.weights).restore_(self.backup)
            self.replicas.reshard()

    def discard(self) -> None:
        """Forget a step of which nothing has run, and so nothing is to be put back."""
        self.backup.discard()
        self.statistics.forget()
        self.later_draws = self.first_draws = None
        self.aside = None
        self.pairs, self.failed = 0, False
        self.abort()

    def finish_pair(self) -> None:
        """Count a completed pair."""
        self.pairs += 1
        self.stage = Stage.IDLE

    def abort(self) -> None:
        """Put everything back as it was before the pass, whatever has happened in it. Idempotent."""
        self.restore()
        self.unfreeze()
        self.leave_descent()
        if self.aside is not None:
            put(self.params, self.aside)
            self.aside = None
        self.at_end = []
        self.stage = Stage.IDLE


_WAYS_OUT = {
    Stage.ASCENT: "leave the ascent() context first",
    Stage.ASCENDED: "run `with opt.descent(): ...` first, or drop the ascent with restore()",
    Stage.DESCENT: "leave the descent() context first",
    Stage.FIRST: "call second_step() first, or undo first_step() with restore()",
}
_WAYS_IN = {
    Stage.ASCENDED: "run `with opt.ascent(): ...` first",
    Stage.FIRST: "call first_step() first",
}


class ScalerTarget:
    """What a GradScaler steps within `step(loss_fn, ..., scaler=)`: the groups, and an update in place of a step."""

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: Any) -> None:
        self._reference = weakref.ref(optimizer)  # whose own part this is

    @property
    def _optimizer(self) -> Any:
        return self._reference()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, for the scaler to unscale."""
        return self._optimizer.param_groups

    def forget(self) -> None:
        """Drop what a scaler has set."""
        self.__dict__.pop("grad_scale", None)
        self.__dict__.pop("found_inf", None)

    def step(self) -> None:
        """Called by the scaler, with its scale and its finding set as attributes."""
        self._optimizer._update(self.__dict__.get("grad_scale"), self.__dict__.get("found_inf"))


class Pass(ExitStack):
    """A context whose exit is registered twice: if an interrupt hits the first call, the second puts things right.

    Args:
        run: the state to act on.
        check: raises where the pass may not start, before anything changes.
        enter: starts the pass.
        leave: ends it after success.
    """

    def __init__(
        self, run: Run, check: Callable[[], None], enter: Callable[[], None], leave: Callable[[], None]
    ) -> None:
        super().__init__()
        self._run, self._check, self._begin, self._end = run, check, enter, leave

    def __enter__(self) -> "Pass":
        self._check()
        self._left = False
        try:
            self._begin()
            self.push(self._finish)
            self.push(self._finish)
        except BaseException:
            self._finish(*sys.exc_info())
            raise
        return self

    def _finish(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self._run.abort()
            self._run.failed = True
        elif not self._left:
            self._end()
            self._left = True
