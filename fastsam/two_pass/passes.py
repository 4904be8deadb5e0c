"""Ways 2 and 3 of taking a step, and what may be called when.

with opt.ascent():  ...backward()      or    backward(); opt.first_step(zero_grad=True)
with opt.descent(): ...backward()            backward(); opt.second_step(zero_grad=True)
opt.step()
"""

from abc import abstractmethod
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastsam.distributed.ddp import PerturbSync, Replicas
from fastsam.two_pass.gradients import flat, take
from fastsam.two_pass.state import Pass, Run, ScalerTarget, Stage
from fastsam.two_pass.wrapper import WrappedOptimizer

_UNDER_WAY = (Stage.ASCENT, Stage.ASCENDED, Stage.DESCENT, Stage.FIRST)


class PassOptimizer(WrappedOptimizer):
    """A wrapped optimizer with a first and a second pass, whose weights are perturbed in the second alone."""

    model: nn.Module | None
    same_rng: bool
    perturb_sync: PerturbSync

    def __getstate__(self) -> dict[str, Any]:
        self._run.refuse("copying or pickling the optimizer", Stage.DESCENT, Stage.FIRST)
        return {k: v for k, v in super().__getstate__().items() if k not in ("_run", "_scaler_target")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def _start(self) -> None:
        replicas = Replicas(self.model, self._params(), self.perturb_sync)
        self._run = Run(self.param_groups, self.model, replicas)
        self._scaler_target = ScalerTarget(self)

    # what users read

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps skipped since construction: a 0-dim int64 tensor on the first parameter's device."""
        return self._run.skipped

    @property
    def last_grad_norm(self) -> Tensor | None:
        """Norm of the ascent gradient that this rank last used: a 0-dim tensor on its device.

        None if nothing was perturbed.
        """
        return self._run.last_grad_norm

    def _params(self) -> list[Tensor]:
        return flat(self.param_groups)

    @abstractmethod
    def _perturb_params(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Perturb the weights in place along the ascent gradient."""

    # way 2: contexts

    def ascent(self) -> Pass:
        """Context for the first pass: its backward passes leave the ascent gradient, and p.grad as it was.

        Run the forward inside as well: DDP decides there whether the backward reduces.

        Raises:
            RuntimeError: inside another pass, or the last ascent has not been used by a descent.
        """
        self._check_form("ascent()")
        check = partial(self._run.require, "ascent()", Stage.IDLE)
        return Pass(self._run, check, self._enter_ascent, self._run.leave_ascent)

    def _enter_ascent(self) -> None:
        self._run.enter_ascent(self.param_groups, self.same_rng, self._ascends_locally())

    def _ascends_locally(self) -> bool:
        """Whether DDP is to leave the ascent's gradients as they are on each rank."""
        return self._run.replicas.is_local

    def _check_form(self, call: str) -> None:
        """Raise RuntimeError if the method cannot take its step in this form. Methods override it."""

    def descent(self, sync: bool = True) -> Pass:
        """Context for the second pass, at perturbed weights: its backward passes add to p.grad.

        Weights are restored when it is left, whatever happens in it. After one pair or several, call `step()` or
        `scaler.step(opt)`. Several backwards in one pair make one large batch; with several pairs, each with its own
        perturbation, weighting the shards' losses is yours.

        Args:
            sync: reduce gradients between DDP's ranks. Where several pairs come before one step, pass False to all but
                the last descent, which then reduces their sum, once. FSDP2 reduces in any case.

        Raises:
            RuntimeError: no ascent came before, or inside another pass.
        """
        check = partial(self._run.require, "descent()", Stage.ASCENDED)
        enter = partial(self._run.enter_descent, self._perturb_params, sync)
        return Pass(self._run, check, enter, self._leave_descent)

    def _leave_descent(self) -> None:
        self._run.leave_descent()
        self._run.restore()
        self._run.finish_pair()

    # way 3: two calls

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights along the gradient in p.grad, as davda54/sam does; `second_step` comes next.

        Random draws are not replayed in this way; with `model`, batch-norm statistics are those of the first pass.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: a pass is under way, or no backward has run since the last step.
        """
        run = self._run
        self._check_form("first_step()")
        run.require("first_step()", Stage.IDLE)
        if run.consumed.covers(self.param_groups):
            raise RuntimeError("first_step() needs fresh gradients; call backward() first")
        if run.replicas.is_local:
            raise RuntimeError(
                f"first_step() finds gradients that are reduced already, but perturb_sync={self.perturb_sync!r} needs "
                "this rank's own; use opt.step(loss_fn, *batch), or opt.ascent() and opt.descent()"
            )
        try:
            run.params, run.ascent_is_local = self._params(), False
            run.ascent_grads = take(run.params)
            run.enter_descent(self._perturb_params)
            run.stage = Stage.FIRST
            if zero_grad:
                self.zero_grad()
        except BaseException:
            run.abort()
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and take the base optimizer's step with the gradient in p.grad.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: first_step() did not come before.
        """
        run = self._run
        run.require("second_step()", Stage.FIRST)
        try:
            run.leave_descent()
            run.in_second_step = True
            self.step()
            if zero_grad:
                self.zero_grad()
        except BaseException:
            run.abort()
            raise
        finally:
            run.in_second_step = False

    def restore(self) -> None:
        """Undo a `first_step`, or drop an ascent that no descent will use: weights and statistics are as before."""
        self._run.refuse("restore()", Stage.ASCENT, Stage.DESCENT)
        self._run.abort()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them a failed pass or finished pairs that no step has used.

        Args:
            set_to_none: drop the gradients rather than filling them with zeros.
        """
        run = self._run
        if run.stage is Stage.ASCENT and not run.pairs:
            run.clear_aside(set_to_none)
        super().zero_grad(set_to_none)
        run.consumed.set(self.param_groups, zeroed=not set_to_none)
        if run.stage is Stage.IDLE:
            run.failed, run.pairs, run.at_end = False, 0, []

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict; a plain base optimizer of the same class loads it.

        Raises:
            RuntimeError: the weights are perturbed, so a checkpoint made now would hold the wrong ones.
        """
        self._run.refuse("state_dict()", Stage.DESCENT, Stage.FIRST)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the plain base optimizer, or of davda54's SAM around such a base.

        Knobs that the dict lacks keep the values they have here.

        Raises:
            RuntimeError: a pass is under way.
            ValueError: a bad knob, or other numbers of groups or parameters than here.
        """
        self._run.refuse("load_state_dict()", *_UNDER_WAY)
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; knobs that it does not name take the constructor's values.

        Raises:
            RuntimeError: a pass is under way.
            ValueError: a bad knob, or a parameter that is there already.
        """
        self._run.refuse("add_param_group()", *_UNDER_WAY)
        super().add_param_group(param_group)
