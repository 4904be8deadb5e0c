"""The ways of taking a step pass by pass, contexts and two calls, and what may be called when.

with opt.ascent():  ...backward()      or    backward(); opt.first_step(zero_grad=True)
with opt.descent(): ...backward()            backward(); opt.second_step(zero_grad=True)
opt.step()
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch._compile import _disable_dynamo as uncompiled

from fastsam.arguments import check_flag, check_grad_scale
from fastsam.distributed.ddp import ParallelModel, PerturbSync
from fastsam.distributed.unsupported import refuse_unsupported
from fastsam.schedule import Schedule, scale_of
from fastsam.two_pass.gradients import copies, flat, follow_steps, put, take
from fastsam.two_pass.interrupts import Attempt, Pass
from fastsam.two_pass.losses import joined
from fastsam.two_pass.module_state import Modules, ModuleState, as_one, modules_of
from fastsam.two_pass.scaler_target import ScalerTarget
from fastsam.two_pass.stage import Stage
from fastsam.two_pass.state import StepState
from fastsam.two_pass.wrapper import ACTIVE, SEED, STEP, TAKEN, WrappedOptimizer, weakly

_UNDER_WAY = (Stage.ASCENT, Stage.ASCENDED, Stage.DESCENT, Stage.FIRST)


class PassOptimizer(WrappedOptimizer):
    """A wrapped optimizer with a first and a second pass, whose weights are perturbed in the second alone."""

    keep: Sequence[Any]
    generators: Sequence[Any]
    same_rng: bool
    stochastic_rounding: bool
    perturb_sync: PerturbSync | None
    when: Schedule | None
    perturb_sync_under_ddp: Literal["global", "replica"] = "global"
    """What perturb_sync=None means where DistributedDataParallel reduces gradients."""

    @property
    def model(self) -> Modules:
        """The module that is trained, or its wrapper; or a sequence of modules."""
        return self._named[0]

    @model.setter
    def model(self, model: Modules) -> None:
        # In a list that a framework's proxy shares, which keeps its own attributes to itself.
        try:
            self._named[0] = model
        except AttributeError:
            self._named: list[Modules] = [model]

    def __getstate__(self) -> dict[str, Any]:
        self._run.refuse("copying or pickling the optimizer", Stage.DESCENT, Stage.FIRST)
        kept = {k: v for k, v in super().__getstate__().items() if k not in ("_run", "_scaler_target")}
        return {**kept, "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "skipped_steps"})
        # a copy has no step under way, and only what is no copy has one already
        if "_run" not in self.__dict__:
            self._start()
            if "skipped_steps" in state:
                self._run.skipped = state["skipped_steps"]

    if not TYPE_CHECKING:  # or nothing would be an unknown attribute

        def __getattr__(self, name: str) -> Any:
            # Schedule-free bases switch between the weights of training and of evaluation; others have no such methods.
            if name not in ("train", "eval") or not hasattr(self.__dict__.get("base_optimizer"), name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return partial(self._switch, name)

    def _switch(self, mode: str) -> None:
        self._run.refuse(f"{mode}()", *_UNDER_WAY)
        getattr(self.base_optimizer, mode)()

    def _start(self) -> None:
        refuse_unsupported(self._params())
        self._run = StepState(self.param_groups, self._module_state(), weakly(self._combines), self.generators)
        self._look_at_schedule()
        self._scaler_target = ScalerTarget(self)
        follow_steps(self.base_optimizer, self._run)

    def _bind(self) -> None:
        """Go by another model from the next step on."""
        self._run.module_state = self._module_state()
        # Looked for again when the next step begins.
        self._run.parallel_model = None  # type: ignore[assignment]

    def _module_state(self) -> ModuleState:
        return ModuleState(modules_of(self.model), self.keep, weakly(self._averages_statistics))

    def check_groups(self) -> None:
        """Raise TypeError or ValueError for a bad option that somebody has set in a group, or a bad scale of `when`."""
        super().check_groups()
        self._look_at_schedule()

    def _look_at_schedule(self) -> None:
        """See whether and how far the next step perturbs; what a step has begun with holds to its end."""
        run = self._run
        if run.stage is Stage.IDLE and not run.pairs:
            run.scale = scale_of(self.when, self.param_groups[0][TAKEN])
            run.is_active = run.scale > 0 and self.has_radius()

    def _warn_about_schedule(self, begun: int, stacklevel: int = 5) -> None:
        """Say once that the run is longer than `when` was told, or is over and nothing has been perturbed.

        Args:
            begun: steps of the run, one that is under way included.
            stacklevel: of the warning: how far up the user is.
        """
        run, group, total = self._run, self.param_groups[0], getattr(self.when, "total_steps", None)
        if run.warned_about_schedule or not isinstance(total, int) or group[TAKEN] < total:
            return
        if group[ACTIVE] == 0:
            reason = (
                f"{group[TAKEN]} steps are taken, and none of them was perturbed: rho was 0, or the steps were the "
                "base optimizer's own"
            )
        elif begun > total:
            reason = (
                f"this is step {begun} of a run that is to have total_steps={total}: what it says of the end holds on. "
                "Pass the length of the whole run, so that the part meant is the one that is perturbed"
            )
        else:
            return
        run.warned_about_schedule = True
        warnings.warn(f"when={self.when!r}: {reason}", stacklevel=stacklevel)

    def _averages_statistics(self) -> bool:
        return self._run.is_active and self.averages_statistics()

    def _has_two_passes(self) -> bool:
        return self._run.is_active and self.has_second_pass()

    def _find_ranks(self) -> ParallelModel:
        """Return the ranks that train the model, found when the first step begins, on all ranks together."""
        run = self._run
        if run.parallel_model is None:
            params = self._params()
            ranks = ParallelModel(as_one(self.model), params, self.perturb_sync, self.perturb_sync_under_ddp)
            if self.has_draws():
                ranks.refuse_other_seeds(self.param_groups[0][SEED], params)
            run.parallel_model = ranks
        return run.parallel_model

    # what users read

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps skipped since construction: a 0-dim int64 tensor on the first parameter's device."""
        return self._run.skipped

    @property
    def last_grad_norm(self) -> Tensor | None:
        """Norm of the ascent gradient that this rank last used, without a loss scale: a 0-dim tensor on its device.

        None if nothing was perturbed; and after contexts under a GradScaler whose `unscale_` was called, unless
        `ascent(grad_scale=)` was told its scale.
        """
        return self._run.last_grad_norm

    @property
    def last_perturbed_loss(self) -> Tensor | None:
        """The last second pass's loss over the rows of the loss that `step` or `backward` returned: 0-dim, detached.

        Their difference is the sharpness of the batch. Over all rows also where a method goes back from a part of them;
        of several parts each at its own perturbed weights. None after steps without a second pass, and in other ways
        than `step(loss_fn, *batch)` and `backward(loss_fn, *batch)`.
        """
        losses = self._run.perturbed_losses
        return joined(losses) if losses else None

    def _params(self) -> list[Tensor]:
        return flat(self.param_groups)

    # what the engine does in a pass

    @abstractmethod
    def has_radius(self) -> bool:
        """Whether the groups' options let anything be perturbed."""

    @abstractmethod
    def has_second_pass(self) -> bool:
        """Whether the next step has a second pass, if it perturbs."""

    @abstractmethod
    def has_draws(self) -> bool:
        """Whether the perturbation depends on random numbers."""

    @abstractmethod
    def averages_statistics(self) -> bool:
        """Whether batch norm's statistics move once in a step of several pairs."""

    @abstractmethod
    def check(self, call: str, rows: int | None = None) -> None:
        """Raise if the method cannot take its step in this form."""

    @abstractmethod
    def _combines(self) -> bool:
        """Whether the method makes its own of a second pass's gradient."""

    @abstractmethod
    def _enter_ascent(self, is_partial: bool = False) -> None:
        """Begin the first pass; its backward may leave some gradients out, if it is ours."""

    @abstractmethod
    def _perturb_params(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Perturb the weights in place along the ascent gradient."""

    @abstractmethod
    def _combine(self) -> None:
        """Let the method make its own of what a pass has left in p.grad."""

    @property
    def needs_second_pass(self) -> bool:
        """Whether the next step has a second pass; loops with contexts or two calls may leave it out where not."""
        self.check_groups()
        return self._has_two_passes()

    # contexts

    def ascent(self, grad_scale: Tensor | float | None = None) -> Pass:
        """Context for the first pass: its backward passes leave the ascent gradient, and p.grad as it was.

        Run the forward inside as well: DDP decides there whether the backward reduces. In a step without a second pass
        (`needs_second_pass`) it is the only one: its backward adds to p.grad as any backward does, and `step()` may
        follow at once.

        Args:
            grad_scale: what the loss is multiplied by before its backward, a GradScaler's scale; for methods whose
                state must not hold it (LookSAM), and for `last_grad_norm` where `scaler.unscale_` is called before the
                step. Default: 1.

        Raises:
            RuntimeError: inside another pass, or the last ascent has not been used by a descent.
        """
        check_grad_scale(grad_scale)
        self.check_groups()
        self.check("ascent()")
        self._refuse_no_sync("ascent()")
        check = partial(self._run.require, "ascent()", Stage.IDLE)
        if self._has_two_passes():
            return self._pass(check, partial(self._begin_ascent, grad_scale), self._run.leave_ascent)
        return self._pass(check, partial(self._begin_single, grad_scale), self._leave_single)

    def _pass(self, check: Callable[[], None], enter: Callable[[], None], leave: Callable[[], None]) -> Pass:
        return Pass(Attempt(self._run, check, enter, leave, self._fail_pass))

    def _fail_pass(self) -> None:
        self._run.abort()
        self._run.failed = True

    def _attempt(self, enter: Callable[[], None], fail: Callable[[], None]) -> Pass:
        """Return a context for a call of ours, which does `fail` where an exception leaves it."""
        return Pass(Attempt(self._run, _nothing, enter, _nothing, fail))

    def _begin_ascent(self, grad_scale: Tensor | float | None) -> None:
        self._run.grad_scale, self._run.factor, self._run.perturbed_losses = grad_scale, None, []
        self._enter_ascent()

    def _begin_single(self, grad_scale: Tensor | float | None) -> None:
        self._run.grad_scale, self._run.factor, self._run.perturbed_losses = grad_scale, None, []
        self._run.enter_single(self.param_groups, self._syncs(True), self.same_rng)

    def _leave_single(self) -> None:
        self._run.last_grad_norm = None
        if self._run.is_active:
            self._combine()
            self._count_step()
        self._run.leave_single()

    def _count_step(self) -> None:
        """Move on to the next perturbation's random numbers."""
        next_step = self.param_groups[0][STEP] + 1
        for group in self.param_groups:
            group[STEP] = next_step

    def _forget_pairs(self) -> None:
        """Begin another step. One that failed has used up its random numbers, so that no mask fails for ever."""
        if self._run.failed:
            self._count_step()
        self._run.forget_pairs()

    def descent(self, sync: bool = True) -> Pass:
        """Context for the second pass, at perturbed weights: its backward passes add to p.grad.

        Weights are restored when it is left, whatever happens in it. After one pair or several, call `step()` or
        `scaler.step(opt)`. Several backwards in one pair make one large batch; with several pairs, each with its own
        perturbation, weighting the shards' losses is yours. In a step without a second pass it is not needed; where it
        is run all the same, its gradient, at weights that nothing perturbs, with the same draws, takes the place of the
        first one's.

        Args:
            sync: reduce gradients between DDP's ranks. Where several pairs come before one step, pass False to all but
                the last descent, which then reduces their sum, once. FSDP2 reduces in any case, and so do methods that
                combine both gradients, pair by pair.

        Raises:
            RuntimeError: no ascent came before, or inside another pass.
        """
        check_flag("sync", sync)
        self.check_groups()
        self._refuse_no_sync("descent()")
        return self._pass(self._check_descent, partial(self._enter_descent, sync), self._leave_descent)

    @property
    def _is_needless(self) -> bool:
        """Whether a descent that begins now follows the only pass of a step."""
        return self._run.stage is Stage.IDLE and self._run.before_single is not None

    def _check_descent(self) -> None:
        self._run.require("descent()", Stage.IDLE if self._is_needless else Stage.ASCENDED)

    def _refuse_no_sync(self, call: str) -> None:
        ranks = self._find_ranks()
        ranks.refuse_kept_gradients(call)
        if ranks.is_inside_no_sync and self._combines():
            raise RuntimeError(
                f"{call} inside no_sync(): {type(self).__name__} combines the gradients of every pair, so each pair "
                "has to be reduced between the ranks; leave no_sync() out"
            )

    @abstractmethod
    def _syncs(self, sync: bool) -> bool:
        """Whether a second pass reduces between DDP's ranks, where the user or the step asks for `sync`."""

    def _enter_descent(self, sync: bool) -> None:
        if self._is_needless:
            self._run.undo_single()
            self._run.enter_descent(_perturb_nothing, self._syncs(True))
        else:
            self._run.enter_descent(self._perturb_params, self._syncs(sync))

    def _leave_descent(self) -> None:
        self._combine()
        self._run.add_aside()
        self._run.leave_descent()
        self._run.restore()
        self._run.finish_pair()

    # two calls

    @uncompiled
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights along the gradient in p.grad, as davda54/sam does; `second_step` comes next.

        Random draws are not replayed in this way. With `model`, module state is that of the first pass; the second one
        starts from what `second_step` left before, which is not known in the first step, where it starts from what the
        first pass left.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: a pass is under way, or no backward has run since the last step.
        """
        run = self._run
        check_flag("zero_grad", zero_grad)
        self.check_groups()
        self.check("first_step()")
        run.require("first_step()", Stage.IDLE)
        ranks = self._find_ranks()
        ranks.refuse_kept_gradients("first_step()")
        if run.pairs:
            raise RuntimeError(
                "first_step() finds the gradients of finished ascent()/descent() pairs, along which nothing is to be "
                "perturbed; call opt.step() to use them, or zero_grad() to drop them, first"
            )
        if run.consumed.covers(self.param_groups):
            raise RuntimeError("first_step() needs fresh gradients; call backward() first")
        if ranks.is_local and not ranks.left_unreduced:
            raise RuntimeError(
                f"first_step() finds gradients that are reduced already, but perturb_sync={ranks.perturb_sync!r} needs "
                "this rank's own; use opt.step(loss_fn, *batch), or opt.ascent() and opt.descent()"
            )
        params, grads = self._params(), take(self._params())

        def fail() -> None:
            run.abort()
            put(params, grads)

        with self._attempt(partial(run.note_count, self.param_groups), fail):
            run.params, run.ascent_is_local, run.perturbed_losses = params, ranks.left_unreduced, []
            # zero_grad() may write zeros into them, or the mean over ranks
            is_written = self._combines() or run.ascent_is_local
            run.ascent_grads = copies(run.params) if is_written else grads
            perturb = self._perturb_params if self._has_two_passes() else self._perturb_none
            run.enter_descent(perturb, keeps_gradients=True)
            run.stage = Stage.FIRST
            if zero_grad:
                self.zero_grad()

    @uncompiled
    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and take the base optimizer's step with the gradient in p.grad. `step()` does the same.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: first_step() did not come before.
        """
        run = self._run
        check_flag("zero_grad", zero_grad)
        run.require("second_step()", Stage.FIRST)
        with self._attempt(partial(setattr, run, "is_taken", False), self._fail_second_step):
            # that of a framework's proxy, where this is one
            self.step()
            if zero_grad:
                self.zero_grad()

    def _end_second_pass(self) -> None:
        self._combine()
        self._run.leave_descent()

    def _fail_second_step(self) -> None:
        run = self._run
        run.end()
        run.in_second_step, run.failed = False, not run.is_taken

    def restore(self) -> None:
        """Undo a `first_step`, or drop an ascent that no descent will use: weights and statistics are as before."""
        run = self._run
        run.refuse("restore()", Stage.ASCENT, Stage.DESCENT)
        if run.pairs:
            # what the finished pairs have drawn is used
            run.count_before = None
        run.abort()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them a failed pass or finished pairs that no step has used.

        Args:
            set_to_none: drop the gradients rather than filling them with zeros.
        """
        run = self._run
        run.mend()
        if run.stage is Stage.ASCENT and not run.pairs:
            run.clear_aside(set_to_none)
        super().zero_grad(set_to_none)
        run.consumed.set(self.param_groups, zeroed=not set_to_none)
        # A closure that zeroes in a step which is to use finished pairs ends none of them.
        if run.stage is Stage.IDLE and run.attempt is None:
            self._forget_pairs()
            run.at_end, run.base_failed = [], False

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; a plain base optimizer of the same class loads it.

        Raises:
            RuntimeError: the weights are perturbed, so a checkpoint made now would hold the wrong ones.
        """
        self._run.refuse("state_dict()", Stage.DESCENT, Stage.FIRST)
        self._warn_about_schedule(self.param_groups[0][TAKEN], stacklevel=3)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the plain base optimizer, or of davda54's SAM around such a base.

        Knobs that the dict lacks keep the values they have here.

        Raises:
            RuntimeError: a pass is under way.
            ValueError: a bad hyperparameter, or other numbers of groups or parameters than here.
        """
        self._run.refuse("load_state_dict()", *_UNDER_WAY)
        super().load_state_dict(state_dict)
        self._run.deferred_state.clear()
        self._run.base_failed, self._run.count_before = False, None
        self._look_at_schedule()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; hyperparameters that it does not name take the constructor's values.

        Raises:
            RuntimeError: a pass is under way.
            ValueError: a bad hyperparameter, or a parameter that is there already.
        """
        self._run.refuse("add_param_group()", *_UNDER_WAY)
        super().add_param_group(param_group)

    def _perturb_none(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        self._run.last_grad_norm = None
        if self._run.is_active:
            self._count_step()


def _nothing() -> None:
    """Stand in for what a call of ours has neither to check nor to leave."""


def _perturb_nothing(params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Stand in for the perturbation of a step that has been counted and perturbs nothing."""
