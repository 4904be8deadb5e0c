"""The passes of one step: what is set aside around each, and how everything is put back whatever happens."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed.ddp import ParallelModel
from fastsam.kernels import ops
from fastsam.kernels.calls import Call, run_all
from fastsam.kernels.tensor_list import Backup
from fastsam.two_pass.ascent import Ascent
from fastsam.two_pass.forward_alone import ForwardAlone
from fastsam.two_pass.gradients import ConsumedMark, clear, copies, flat, put, sums, take
from fastsam.two_pass.interrupts import Attempt
from fastsam.two_pass.losses import Losses
from fastsam.two_pass.module_state import ModuleState
from fastsam.two_pass.rng import RandomState
from fastsam.two_pass.stage import WAYS_IN, WAYS_OUT, Stage, execute
from fastsam.two_pass.wrapper import STEP


def found_inf_of(optimizer: Any) -> Tensor | None:
    """Return a 0-dim tensor that is not 0 if the step that is just over was skipped; None if nobody has looked."""
    run = getattr(optimizer, "_run", None)
    # Another optimizer has the flag where GradScaler puts it.
    return run.found_inf if isinstance(run, StepState) else getattr(optimizer, "found_inf", None)


class StepState:
    """The state of a step that is under way, and the way into and out of its passes.

    One object, because frameworks make proxies of an optimizer that share its attributes but not later assignments.

    Args:
        groups: the optimizer's parameter groups.
        module_state: of the modules that are kept to one forward.
        owns_descent: returns whether a second pass leaves its gradient alone in p.grad until `add_aside`, as a method
            that combines it with the first pass's needs it.
        generators: of random numbers, beside the global ones.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        module_state: ModuleState,
        owns_descent: Callable[[], bool],
        generators: Sequence[Any] = (),
    ) -> None:
        self._stage = Stage.IDLE
        self.attempt: Attempt | None = None
        """The innermost of the contexts that are open."""
        self.failed = False
        self.base_failed = False
        """Whether the base optimizer's own step has begun and has not ended."""
        self.rest: list[Callable[[], Any]] | None = None
        """What is left to do of an update that has begun; each of it may be done again."""
        self.tries = 0
        """How often it was cut short."""
        self.followers: OrderedDict[int, Callable[[Tensor | None], list[Call]]] = OrderedDict()
        """What is updated with the weights: each returns the calls that do so, given what is not 0 after a skip."""
        self.is_taken = False
        """Whether the update of this step, or else of the last one, is over."""
        self.count_before: tuple[Sequence[dict[str, Any]], int] | None = None
        """The groups, and how many perturbations came before the step."""
        self.pairs = 0
        self.in_second_step = False
        self.warned_about_base_step = self.warned_about_schedule = False
        self.scale, self.is_active = 1.0, True
        """What rho is multiplied by, and whether anything is perturbed, in the step that is under way or comes next."""
        self.owns_descent = owns_descent
        self.params: list[Tensor] = []
        self.aside: list[Tensor | None] | None = None
        # p.grad before the last ascent() of a step without a second pass, for a descent() that follows all the same
        self.before_single: list[Tensor | None] | None = None
        self.ascent_grads: list[Tensor | None] = []
        self.ascent: Ascent | None = None
        self.grad_scale: Tensor | float | None = None
        """What the gradients of the step that is under way are multiplied by, if it is known."""
        self.factor: Tensor | None = None
        """What the caller of `backward` multiplied the loss of the last pass by."""
        self.backup = Backup([])
        self.perturbed_version = 0
        # Known when the first step begins.
        self.parallel_model: ParallelModel = None  # type: ignore[assignment]
        self.ascent_is_local = False
        self.is_first_forward = False
        self.forward_alone = ForwardAlone()
        self.base_stepped = False
        self.unreduced = ExitStack()
        self.module_state = module_state
        self.share = 1.0
        """What the running statistics of the pair that is under way count among those of the step's pairs."""
        self.generators = generators
        self.first_draws: RandomState | None = None
        self.later_draws: RandomState | None = None
        self.consumed = ConsumedMark()
        self.last_grad_norm: Tensor | None = None
        self.perturbed_losses: list[Losses] = []
        """Of the second passes of the last `step(loss_fn, *batch)` or `backward(loss_fn, *batch)`."""
        device = next((p.device for p in flat(groups)), torch.device("cpu"))
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.found_inf: Tensor | None = None
        self.at_end: list[Callable[[], None]] = []
        self.pending: dict[Any, Any] = {}
        self.deferred_state: dict[tuple[int, str], Tensor] = {}
        """State of the method for parameters that the base optimizer has none for yet, by id and name."""

    @property
    def stage(self) -> Stage:
        """Where the step is. A pass that it enters is the innermost of the thread until it is left."""
        return self._stage

    @stage.setter
    def stage(self, stage: Stage) -> None:
        self._stage = stage
        execute(self, stage)

    @property
    def has_passes(self) -> bool:
        """Whether p.grad holds what passes have left there, so that a step needs none of its own."""
        return self.pairs > 0 or self.stage is Stage.FIRST

    def commit(self, calls: Sequence[Call], rest: Sequence[Callable[[], Any]], is_foreign: bool) -> None:
        """Update everything: before `calls` have run nothing has changed, and after them all the rest is done.

        Args:
            calls: the base's step and the restore of the weights, run as one.
            rest: what follows; each is done again where it was cut short.
            is_foreign: whether a step runs that is not ours, which nobody can undo.
        """
        self.base_failed, self.tries = is_foreign, 0
        with torch.no_grad():
            run_all([*calls, partial(setattr, self, "rest", rest)])
        self.complete()

    def complete(self) -> None:
        """Do what is left of an update that has begun."""
        while self.rest:
            rest = self.rest[0]
            try:
                rest()
            except Exception as error:
                # what is wrong in itself would be wrong again
                if not isinstance(error, MemoryError):
                    del self.rest[0]
                raise
            # what can be done once alone has gone by itself
            if self.rest and self.rest[0] is rest:
                del self.rest[0]
        self.base_failed, self.is_taken, self.rest = False, True, None

    def follow(self, prepare: Callable[[Tensor | None], list[Call]]) -> None:
        """Update what is updated with the weights, and note in the same moment that this has been done."""
        assert self.rest is not None
        run_all([*prepare(self.found_inf), partial(self.rest.pop, 0)])

    def finish(self) -> None:
        """The step has been taken: do what waited for it."""
        self.forget_pairs()
        # A loop with first_step is likely to go on with it.
        self.module_state.expect(self.in_second_step)
        torch.clear_autocast_cache()  # an autocast around the steps would go on with casts of the weights before it
        self.stage = Stage.IDLE
        while self.at_end:
            self.at_end[0]()
            del self.at_end[0]

    def forget_pairs(self) -> None:
        """Begin another step: no pair has been taken, and none has failed."""
        self.pairs, self.failed, self.before_single, self.pending, self.share = 0, False, None, {}, 1.0
        self.count_before = self.first_draws = None
        self.grad_scale = self.factor = None
        self.module_state.end()

    def mend(self) -> None:
        """End passes that an interrupt has left open, so that nobody else will."""
        while self.attempt is not None and self.attempt.is_lost:
            self.attempt.fail()

    def refuse(self, call: str, *stages: Stage) -> None:
        """Raise RuntimeError if the step is in one of these stages."""
        self.mend()
        if self.stage in stages:
            raise RuntimeError(f"{call} cannot be called {self.stage.value}; {WAYS_OUT[self.stage]}")

    def require(self, call: str, stage: Stage) -> None:
        """Raise RuntimeError unless the step is in this stage and no pass of it has failed."""
        self.mend()
        self.refuse_failed_base(call)
        if self.failed:
            raise RuntimeError(f"{call} after a failed pass; call zero_grad() and start the step again")
        if self.stage is not stage:
            way_out = WAYS_IN[stage] if self.stage is Stage.IDLE else WAYS_OUT[self.stage]
            raise RuntimeError(f"{call} cannot be called {self.stage.value}; {way_out}")

    def refuse_failed_base(self, call: str) -> None:
        """Raise RuntimeError after an exception in the base optimizer's own step."""
        if self.base_failed:
            raise RuntimeError(
                f"{call} after an exception inside the base optimizer's own step, which may have stepped some weights "
                "and not others; load_state_dict() of the model and the optimizer goes back to a checkpoint, "
                "zero_grad() goes on with the weights as they are"
            )

    def note_factor(self, factor: Tensor) -> None:
        """Note what a caller's backward has multiplied the loss by, a loss scale or the share of a micro-batch or both.

        Shares differ within a step, and what the step's pairs leave is to keep them. So the first factor that is not 0
        stands for the scale of all.
        """
        known = self.grad_scale
        self.grad_scale = torch.where(known == 0, factor, known) if isinstance(known, Tensor) else factor
        self.factor = factor

    def without_factor(self, norm: Tensor) -> Tensor:
        """Return the norm of a pass's gradient without what its loss was multiplied by; 0 where that was 0."""
        return self._divided(norm, self.grad_scale if self.factor is None else self.factor)

    def without_scale(self, tensor: Tensor) -> Tensor:
        """Return a gradient without what those of the step are multiplied by."""
        return self._divided(tensor, self.grad_scale)

    def _divided(self, tensor: Tensor, scale: Tensor | float | None) -> Tensor:
        if scale is None:
            return tensor
        divisor = torch.as_tensor(scale, dtype=tensor.dtype, device=tensor.device)
        if self.factor is not None:
            # the share of an empty micro-batch
            divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
        return tensor / divisor

    # the first pass

    def enter_ascent(self, groups: Sequence[dict[str, Any]], same_rng: bool, is_local: bool = False) -> None:
        """Set p.grad aside, so that the backward that follows leaves the ascent gradient alone in it.

        Args:
            groups: the optimizer's parameter groups.
            same_rng: keep the state of the random number generators for the second pass.
            is_local: keep this rank's gradient unreduced; `ParallelModel.average` is left to do.
        """
        self._start_pass(groups, unreduced=is_local)
        self.first_draws = self._random_state() if same_rng else None
        self._set_aside(unreduced=is_local)
        self.stage = Stage.ASCENT
        self.ascent_is_local = is_local
        if is_local:
            self.unreduced.enter_context(self.parallel_model.no_sync())

    def enter_single(self, groups: Sequence[dict[str, Any]], sync: bool = True, same_rng: bool = False) -> None:
        """Begin the only pass of a step without a second one: its backward adds to p.grad, as a plain step's does.

        Args:
            groups: the optimizer's parameter groups.
            sync: reduce the gradient between DDP's ranks; without, a later pass does it for both.
            same_rng: keep the state of the random number generators, for a descent that follows all the same.
        """
        self._start_pass(groups, unreduced=not sync, is_only=True)
        self.first_draws = self._random_state() if same_rng else None
        # of gradients that are None, as they are but in accumulation, this copies nothing
        self.before_single = copies(self.params)
        if self.owns_descent():
            self._set_aside(unreduced=not sync)
        self.stage, self.ascent_is_local = Stage.ASCENT, False
        if not sync:
            self.unreduced.enter_context(self.parallel_model.no_sync())

    def _start_pass(self, groups: Sequence[dict[str, Any]], unreduced: bool, is_only: bool = False) -> None:
        self.params = flat(groups)
        self.module_state.begin(self.share, is_only)
        self.note_count(groups)
        overwrites = self.parallel_model.overwrites_gradients(unreduced)
        if not self.pairs and self.consumed.covers(groups) and (overwrites or not self.consumed.zeroed):
            # What the last step has left.
            clear(self.params)

    def _random_state(self) -> RandomState:
        return RandomState({p.device for p in self.params}, self.generators)

    def note_count(self, groups: Sequence[dict[str, Any]]) -> None:
        """Note how many perturbations came before the step, of which only the first call counts."""
        if self.count_before is None:
            self.count_before = groups, groups[0][STEP]

    def _rewind_count(self) -> None:
        """Count as before the step, whose perturbations were for nothing. Idempotent."""
        if self.count_before is not None:
            groups, count = self.count_before
            for group in groups:
                group[STEP] = count

    def _set_aside(self, unreduced: bool) -> None:
        overwrites = self.parallel_model.overwrites_gradients(unreduced)
        self.aside = copies(self.params) if overwrites else take(self.params)
        clear(self.params)

    def add_aside(self) -> None:
        """Add what was set aside to what a pass has left in p.grad. Idempotent."""
        if self.aside is not None:
            put(self.params, sums(self.aside, take(self.params)))
            self.aside = None

    def skip_ascent(self, groups: Sequence[dict[str, Any]]) -> None:
        """Go on to the second pass of a step without a first one, whose traces are then the step's."""
        self._start_pass(groups, unreduced=False, is_only=True)
        self.ascent_grads, self.ascent_is_local = [None] * len(self.params), False
        self.is_first_forward, self.stage = True, Stage.ASCENDED

    def leave_ascent(self) -> None:
        """Keep the ascent gradient and put p.grad back."""
        self.unreduced.close()
        # the second pass of a method that combines may not write over the first one's gradient
        overwritten = self.owns_descent() and self.parallel_model.overwrites_gradients(unreduced=self.ascent_is_local)
        # Somebody's no_sync() inside of the pass.
        self.ascent_is_local = self.ascent_is_local or self.parallel_model.left_unreduced
        self.ascent_grads = copies(self.params) if overwritten else take(self.params)
        put(self.params, self.aside or [])
        self.aside = None
        self.stage = Stage.ASCENDED

    def leave_single(self) -> None:
        """Count the only pass of a step without a second one as a pair."""
        self.unreduced.close()
        self.add_aside()
        self.finish_pair()

    # the second pass

    def enter_descent(
        self,
        perturb: Callable[[list[Tensor], list[Tensor | None]], None],
        sync: bool = True,
        keeps_gradients: bool = False,
    ) -> None:
        """Perturb the weights and rewind the random draws, for a second pass whose traces are wiped afterwards.

        Args:
            perturb: perturbs weights along gradients.
            sync: reduce the pass's gradients between DDP's ranks; without, a later pass does it for both.
            keeps_gradients: leave p.grad as it is, for a caller that clears it.
        """
        if not self.is_first_forward:
            self.module_state.turn()
        self.is_first_forward, self.stage = False, Stage.DESCENT
        perturb(self.params, self.ascent_grads)
        self.perturbed_version = self.backup.weights[0]._version if self.backup.weights else 0
        # An autocast around the step would go on with casts of the other weights.
        torch.clear_autocast_cache()
        self.ascent_grads = []
        self.parallel_model.reshard()
        if self.owns_descent() and not keeps_gradients:
            self._set_aside(unreduced=not sync)
        if not sync:
            self.unreduced.enter_context(self.parallel_model.no_sync())
        if self.first_draws is not None:
            self.later_draws = self._random_state()
            self.first_draws.set()

    def undo_single(self) -> None:
        """Put p.grad back to what it was before the only pass of a step, for a descent that follows all the same."""
        put(self.params, self.before_single or [])
        self.before_single = None
        self.pairs -= 1

    def replay(self) -> None:
        """Rewind random draws and module state once more, for another forward in the second pass."""
        self.module_state.replay()
        if self.first_draws is not None:
            self.first_draws.set()

    def leave_descent(self) -> None:
        """Wipe the second pass's traces; the weights stay perturbed until they are restored."""
        self.unreduced.close()
        self.module_state.put_back()
        self._end_passes()

    def _end_passes(self) -> None:
        torch.clear_autocast_cache()
        if self.later_draws is not None:
            self.later_draws.set()
        self.later_draws = self.first_draws = self.ascent = None
        self.ascent_grads = []

    def clear_aside(self, set_to_none: bool) -> None:
        """Clear the gradients that were set aside, or that a needless descent would put back."""
        for grad in (*(self.aside or ()), *(self.before_single or ())):
            if grad is not None and not set_to_none:
                grad.zero_()
        if set_to_none and self.aside is not None:
            self.aside = [None] * len(self.aside)
        if set_to_none and self.before_single is not None:
            self.before_single = [None] * len(self.before_single)

    def backup_of(self, weights: list[Tensor]) -> Backup:
        """Return scratch for copies of these weights: the last step's, if it fits."""
        if not self.backup.fits(weights):
            self.backup = Backup(weights)
        return self.backup

    def drop_backup(self) -> None:
        """Forget the copies of weights that are to stay as they are."""
        self.backup = Backup([])

    def restore(self) -> None:
        """Bring the weights back, bit for bit. Idempotent."""
        if self.backup.valid:
            ops.restore_(self.backup)
            self.parallel_model.reshard()

    def discard(self) -> None:
        """Forget a step of which nothing has run, and so nothing is to be put back."""
        self.backup.discard()
        self.later_draws = self.first_draws = None
        self.aside = None
        self.forget_pairs()
        self.abort()

    def finish_pair(self) -> None:
        """Count a completed pair."""
        self.pairs += 1
        self.stage = Stage.IDLE

    def __del__(self) -> None:
        """Restore the weights that an optimizer leaves perturbed which is dropped, after `first_step()` for example.

        A cycle is disposed of at any time, perhaps long after: random numbers and gradients are others' then, and so
        are weights that something has written to since, and buffers.
        """
        if self.__dict__.get("_stage", Stage.IDLE) is Stage.IDLE or sys.is_finalizing():
            return
        if self.backup.valid and self.backup.weights[0]._version == self.perturbed_version:
            self.later_draws = self.aside = self.before_single = None
            self.abort()
        else:
            self.discard()

    def end(self) -> None:
        """Bring a step that an exception has cut short to an end: undo it, or complete its update where that has begun.

        Idempotent; raises what raises again.
        """
        if self.rest is None:
            self.abort()
            return
        # where others wait for this rank, what it does with them is not done again; else it is tried three times in all
        self.tries += 1
        if self.parallel_model.are_several or self.tries > 2:
            del self.rest[:1]
        self.complete()

    def abort(self) -> None:
        """Put everything back as before the pass, and module state and counts as before the step. Idempotent."""
        self.restore()
        self.unreduced.close()
        self._rewind_count()
        self.module_state.rewind()
        self._end_passes()
        if self.aside is not None:
            put(self.params, self.aside)
            self.aside = None
        elif self.stage is Stage.ASCENT and self.before_single is not None:
            put(self.params, self.before_single)
        self.before_single, self.pending, self.is_first_forward, self.perturbed_losses = None, {}, False, []
        self.at_end = []
        self.stage = Stage.IDLE
