"""`TwoPassOptimizer`: what users of every two-pass method call, and what is checked before a step begins."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

# torch.compiler.disable would import the compiler, and Triton with it.
from torch._compile import _disable_dynamo as uncompiled
from torch.optim import Optimizer

from fastsam.arguments import check_choice, check_clip, check_flag, check_scaler, check_seed, shown
from fastsam.distributed.ddp import PerturbSync, check_perturb_sync
from fastsam.schedule import Schedule, scale_of
from fastsam.two_pass.batch import NO_BATCH, Batch, read_batch
from fastsam.two_pass.capture import recorder
from fastsam.two_pass.engine import Engine, scale_by
from fastsam.two_pass.gradients import GradientWatch, refuse_fresh, take
from fastsam.two_pass.loss_function import LossFunction
from fastsam.two_pass.module_state import Modules, check_keep, modules_of
from fastsam.two_pass.restore_step import is_fusable, not_in_a_kernel
from fastsam.two_pass.rng import check_generators
from fastsam.two_pass.scaler_target import refuse_no_gradient
from fastsam.two_pass.stage import Stage
from fastsam.two_pass.wrapper import ACTIVE, FROM_BASE, TAKEN

_NAMES_OF_WAY_1 = "step(closure)", "step(loss_fn, *batch)"
_WOULD_DRIFT = (
    "nobody would reduce the gradients of its update, and ranks would drift apart. Leave no_sync() out; to accumulate, "
    "run `with opt.ascent(): ...` and `with opt.descent(): ...` under no_sync(), the last pair without, then opt.step()"
)

OnBaseStep = Literal["raise", "warn", "ignore"]
_WAYS_TO_STEP = (
    "Call opt.backward(loss_fn, *batch, backward=...) in place of the forward and backward before it, as loops and "
    "frameworks that own the step need it; or take the step with opt.step(loss_fn, *batch), opt.step(closure), or "
    "opt.ascent() and opt.descent(). Where the base's step is meant, call opt.base_optimizer.step() or pass "
    "on_base_step='ignore'"
)


class TwoPassOptimizer(Engine):
    """A base optimizer whose gradient is taken at perturbed weights. Derive from it to write a method.

    A method overrides `perturb`, and of the other hooks those in which it differs; `SAM` is the shortest. The hooks
    stand in `fastsam.two_pass.hooks`, in the order of a step.

    Args:
        params: tensors, named tensors or groups, as for any torch optimizer.
        base_optimizer: class of the optimizer that takes the step, or "apex.FusedSGD" and the like.
        options: the method's hyperparameters with their values, which become keys of every param group, where users
            set them group by group and `option` reads them. `perturb` is added: False leaves a group's tensors out.
        model: the module that is trained, or its wrapper; or a sequence of modules.
        perturb_sync: which ranks share a perturbation: None, "global", "replica" or a number; see `SAM`.
        same_rng: draw the same random numbers in both passes.
        generators: of random numbers, beside the global ones.
        stochastic_rounding: round the perturbation of 16-bit weights stochastically: "auto", True or False.
        check_finite: skip steps whose final gradient is not finite.
        when: the steps that perturb; see `SAM`. A method multiplies its radius by `radius_scale`.
        on_base_step: what a `step()` does that would be the base's alone: "raise", "warn" or "ignore"; see `SAM`.
        keep: module state beside that of `model`, to be kept to one forward as well.
        seed: of the method's random numbers.
        **base_kwargs: the base optimizer's own arguments.

    Raises:
        TypeError, ValueError: see `SAM`.
    """

    # tells GradScaler.step to hand its scale and its found_inf to our step
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        options: dict[str, Any],
        *,
        model: Modules = None,
        perturb_sync: PerturbSync | None = None,
        same_rng: bool = True,
        generators: Sequence[Any] = (),
        stochastic_rounding: Any = "auto",
        check_finite: bool = True,
        when: Schedule | None = None,
        on_base_step: OnBaseStep = "raise",
        keep: Sequence[Any] = (),
        seed: int = 0,
        **base_kwargs: Any,
    ) -> None:
        modules = modules_of(model)
        check_keep(keep)
        check_generators(generators)
        check_perturb_sync(perturb_sync)
        for name, flag in (("same_rng", same_rng), ("check_finite", check_finite)):
            check_flag(name, flag)
        if not isinstance(stochastic_rounding, bool) and not (
            isinstance(stochastic_rounding, str) and stochastic_rounding == "auto"
        ):
            raise ValueError(f"stochastic_rounding must be 'auto', True or False, got {shown(stochastic_rounding)}")
        check_choice("on_base_step", on_base_step, ("raise", "warn", "ignore"))
        check_seed("seed", seed)
        scale_of(when, 0)
        self.when = when
        super().__init__(params, base_optimizer, {**options, "perturb": True}, seed, base_kwargs)
        self.model = model
        self.keep, self.generators = keep, generators
        self.perturb_sync = perturb_sync
        self.same_rng = same_rng
        self.stochastic_rounding = bool(stochastic_rounding)
        self.check_finite = check_finite
        self.on_base_step = on_base_step
        # An error in the first step would come too late.
        self.check("the constructor")
        self._start()
        if modules and not {id(p) for p in self._params()} & {id(p) for m in modules for p in m.parameters()}:
            warnings.warn(
                "none of the optimizer's parameters belongs to model; build the optimizer after to_empty() and the "
                "like, which replace parameters",
                stacklevel=3,
            )

    @classmethod
    def wrap(cls, base_optimizer: Optimizer, *args: Any, **keywords: Any) -> Any:
        """Return the method around an optimizer instance, which keeps its state.

        Args:
            base_optimizer: the instance.
            args, keywords: those of the constructor that follow base_optimizer, without any of the base's own.
        """
        return cls(FROM_BASE, base_optimizer, *args, **keywords)  # type: ignore[arg-type]

    def bind(self, model: Modules) -> None:
        """Name the module that is trained, or its wrapper, after the optimizer was built, as frameworks wrap later.

        Args:
            model: as in the constructor, in place of what was given there.

        Raises:
            TypeError: it is neither a module nor a sequence of modules.
            RuntimeError: a step is under way.
        """
        modules_of(model)
        self._run.refuse("bind()", Stage.ASCENT, Stage.ASCENDED, Stage.DESCENT, Stage.FIRST)
        self.model = model
        self._bind()

    # one step

    @uncompiled
    def step(
        self,
        closure: Callable[..., Any] | None = None,
        *batch: Any,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
        has_aux: bool = False,
    ) -> Any:
        """Take one step.

        `step(loss_fn, *batch)` runs both passes: `loss_fn(*batch)` returns per-sample losses, shape [n], without
        backward, or where the method needs no rows their mean, 0-dim; fastsam takes their mean, runs backward, unscales
        and clips. Gradients that are there are discarded.
        `step(closure)` is torch's convention: the closure runs zero_grad and backward itself, once in each pass.
        `step()` finishes `backward(...)` calls and `ascent()`/`descent()` pairs, and after `first_step()` it is
        `second_step()`; otherwise it would be the base optimizer's step, which `on_base_step` refuses. A closure that a
        framework passes there is called once, and may clip the gradients, but neither add to them nor drop them.

        Args:
            closure: the loss function or closure.
            batch: its arguments, of n rows: tensors and NumPy arrays with a leading size n, sequences with one entry
                for each row (texts, lengths, pictures of different sizes), and mappings, sequences, named tuples and
                dataclasses of these at any depth. Methods that use a part of the rows cut all of them. Numbers, texts,
                None, functions, modules and what `fastsam.whole` marks are not cut. The loss function gets containers
                of its own in every pass, and must not change tensors in place.
            scaler: GradScaler for `step(loss_fn, *batch)`; call its `update()` afterwards, as always. In the other
                ways pass this optimizer to `scaler.step`.
            clip_grad_norm: largest 2-norm of the final gradient, for `step(loss_fn, *batch)`.
            has_aux: the loss function returns (losses, aux), for `step(loss_fn, *batch)`.

        Returns:
            The first pass's mean loss, detached, on its device, with has_aux=True (loss, aux), both of the first pass
            (of several shards a list of their aux); what a torch closure returned, as it is; else None.

        Raises:
            TypeError: the loss function returned something else than n losses, or a part of the batch cannot be cut.
            ValueError: leading sizes of the batch differ, a list could be one tensor for each row or tensors of n rows
                each, or clip_grad_norm is not positive.
            RuntimeError: a wrong order of calls, a closure under a GradScaler, fresh gradients before a closure, or the
                loss function changed a tensor of the batch in place.
            Weights and module state are what they were before the step, whatever is raised.
        """
        try:
            read = self._check_step(closure, batch, scaler, clip_grad_norm, has_aux)
        except BaseException:
            self._forget_scaler()
            raise
        with self._attempt(self._begin_step, partial(self._fail_step, closure is not None)):
            if self._run.in_second_step:
                self._end_second_pass()
            if closure is None:
                self._finish_step(self.__dict__.get("grad_scale"), self.__dict__.get("found_inf"))
                loss = None
            elif read is not None:
                loss_fn = LossFunction(closure, read, has_aux)
                loss = loss_fn.with_aux(self._passes_on_batch(loss_fn, read, scaler))
                self._refuse_unreduced(batch)
                self._unscale_and_update(scaler, clip_grad_norm)
            elif self._run.has_passes:
                loss = self._closure_after_passes(closure)
                self._update(None, None)
            else:
                self._start_afresh()
                self._run.perturbed_losses = []
                loss = self._pair(closure, closure)
                self._refuse_unreduced(batch)
                self._update(None, None)
            self._run.in_second_step = False
            return loss

    def _begin_step(self) -> None:
        run = self._run
        run.is_taken, run.in_second_step = False, run.stage is Stage.FIRST

    def _fail_step(self, has_closure: bool) -> None:
        """Undo a step, or complete its update where that has begun."""
        run = self._run
        run.end()
        if run.in_second_step:
            self._fail_second_step()
        elif has_closure and not run.is_taken:
            # What a failed pass leaves is no gradient, and the step that it belongs to is over.
            run.failed = True
            self._start_afresh()
        self._forget_scaler()

    def backward(
        self,
        loss_fn: Callable[..., Any],
        *batch: Any,
        backward: Callable[[Tensor], Any] | None = None,
        has_aux: bool = False,
    ) -> Any:
        """Run both passes of a step, and no update: p.grad then holds the step's gradient, added to what was there.

        For loops and frameworks that own backward or the update: `opt.backward(losses, x, y, backward=accelerator.
        backward)` in place of the forward and backward of a plain loop, then whatever comes next there, `scaler.
        unscale_`, clipping, `opt.step()`. Called for each micro-batch it accumulates; every call is then perturbed by
        itself. A closure that a framework gives to the `opt.step` that follows is called once.

        Args:
            loss_fn: as in `step(loss_fn, *batch)`. Without a batch it is called without arguments and returns one loss.
            batch: its arguments, of n rows.
            backward: runs backward from one 0-dim tensor, which it is given once in every pass (mSAM: in every pass of
                every shard): `accelerator.backward`, `fabric.backward`, `self.manual_backward`,
                `lambda loss: scaler.scale(loss).backward()`, or with a division by the number of micro-batches. What
                it multiplies the loss by is measured, for `last_grad_norm` and for methods that keep a gradient.
                Default: `loss.backward()`.
            has_aux: the loss function returns (losses, aux).

        Returns:
            The first pass's mean loss, detached, on its device; with has_aux=True (loss, aux), as `step` does.

        Raises:
            TypeError: as `step`; or the method needs rows, and there is no batch.
            RuntimeError: as `step`; inside another pass; `backward` left no gradient, as that of an engine which owns
                the step does; or in a captured step. Weights and module state are what they were before.
        """
        run = self._run
        run.require("backward()", Stage.IDLE)
        read = self._check_backward(loss_fn, batch, backward, has_aux)
        function = LossFunction(loss_fn, read, has_aux)
        with self._attempt(self._begin_backward, self._fail_pass):
            return function.with_aux(self._run_pairs(function, read, scale_by(None), backward, finishes=True))

    def _begin_backward(self) -> None:
        if not self._run.pairs:
            self._run.grad_scale = None

    def _check_backward(self, loss_fn: Any, batch: tuple, backward: Any, has_aux: Any) -> Batch:
        """Raise if both passes cannot be run; return the batch as it was read."""
        self.check_groups()
        for name, function in (("loss_fn", loss_fn), ("backward", backward)):
            if not callable(function) and not (name == "backward" and function is None):
                raise TypeError(f"{name} must be a function, got {shown(function)}")
        check_flag("has_aux", has_aux)
        if recorder() is not None:
            raise RuntimeError("backward() cannot be captured: it takes no step; use graph_step with step's arguments")
        self._find_ranks().refuse_kept_gradients("backward()")
        self._refuse_no_sync("backward()")
        if batch:
            read = read_batch(batch)
            self.check("step(loss_fn, *batch)", read.n if self.is_active else None)
            return read
        if self.needs_rows():
            raise TypeError(f"{type(self).__name__}.backward(loss_fn) has no rows to cut; pass the batch")
        return NO_BATCH

    def _check_step(self, closure: Any, batch: tuple, scaler: Any, clip_grad_norm: float | None, has_aux: bool) -> Any:
        """Raise if the step cannot be taken; return the batch as it was read, None without one."""
        run = self._run
        self.check_groups()
        refuse_no_gradient(self.__dict__.get("found_inf"))
        run.refuse("step()", Stage.ASCENT, Stage.ASCENDED, Stage.DESCENT)
        if batch:
            run.refuse("step(loss_fn, *batch)", Stage.FIRST)
        run.refuse_failed_base("step()")
        if run.failed and not batch:
            run.require("step()", Stage.IDLE)
        if closure is not None and not callable(closure):
            raise TypeError(f"step() takes a loss function or closure first, got {type(closure).__name__}")
        ranks = self._find_ranks()
        if closure is not None and (batch or not run.has_passes):
            ranks.refuse_kept_gradients(_NAMES_OF_WAY_1[bool(batch)])
            if ranks.is_inside_no_sync:
                raise RuntimeError(f"{_NAMES_OF_WAY_1[bool(batch)]} inside no_sync(): {_WOULD_DRIFT}")
        if closure is not None and not batch and not run.has_passes:
            self.check("step(closure)")
        check_flag("has_aux", has_aux)
        if not batch and (scaler is not None or clip_grad_norm is not None or has_aux):
            raise TypeError("scaler=, clip_grad_norm= and has_aux= go with step(loss_fn, *batch) alone")
        check_scaler(scaler)
        check_clip(clip_grad_norm)
        if closure is not None and not batch and "found_inf" in self.__dict__:
            raise RuntimeError(
                "scaler.step(opt, closure) cannot unscale the second pass's gradients; use opt.step(loss_fn, *batch, "
                "scaler=scaler), or opt.ascent() and opt.descent() and then scaler.step(opt)"
            )
        is_unscaled = "found_inf" in self.__dict__ and self.__dict__.get("grad_scale") is None
        if run.stage is Stage.FIRST and is_unscaled and self._combines():
            raise RuntimeError(
                f"{type(self).__name__} combines the gradients of first_step() and of the backward after it, but "
                "scaler.unscale_() has taken the scale out of the second one alone; call restore() and leave it "
                "out, or use opt.backward(loss_fn, *batch, backward=...), after which it may come"
            )
        if (
            self.state_holds_scale
            and "found_inf" in self.__dict__
            and run.grad_scale is None
            and self._has_two_passes()
        ):
            raise RuntimeError(
                f"{type(self).__name__} keeps a gradient, which must not hold the loss scale: pass it as "
                "opt.ascent(grad_scale=scaler.get_scale()), or use opt.backward(loss_fn, *batch, backward=...) or "
                "opt.step(loss_fn, *batch, scaler=scaler)"
            )
        read = read_batch(batch) if batch else None
        self._warn_about_schedule(self.param_groups[0][TAKEN] + 1)
        if read is not None:
            self.check("step(loss_fn, *batch)", read.n if run.is_active else None)
        elif run.pairs:
            if run.is_active:
                self.check("step()")
        elif closure is not None and not run.has_passes:
            refuse_fresh(run.consumed, self.param_groups)
        elif not run.has_passes and self._has_two_passes():
            self._check_base_step()
        return read

    def _refuse_unreduced(self, batch: tuple) -> None:
        """Raise RuntimeError where the loss function or closure has run under a no_sync() of its own."""
        ranks = self._run.parallel_model
        if ranks.left_unreduced and self._syncs(True) and not ranks.agree(take(self._params())):
            raise RuntimeError(f"{_NAMES_OF_WAY_1[bool(batch)]} ran its last backward under no_sync(): {_WOULD_DRIFT}")

    def _closure_after_passes(self, closure: Callable[[], Any]) -> Any:
        """Call a framework's closure once, on top of finished passes, whose gradients it may clip and no more."""
        run = self._run
        run.restore()
        run.module_state.hold()
        watch = GradientWatch(self._params())
        with torch.enable_grad(), watch:
            loss = closure()
        if watch.has_changed or (run.consumed.zeroed and run.consumed.covers(self.param_groups)):
            raise RuntimeError(
                "the closure changed p.grad, which holds the gradients of finished ascent()/descent() pairs, or of "
                "second_step()'s backward: the step would be another one's. Leave zero_grad() and backward() out of "
                "it, or call opt.step() without it"
            )
        return loss

    def _check_base_step(self) -> None:
        """Raise, or warn once, where a step of the base optimizer alone may not be meant, as `on_base_step` says."""
        run = self._run
        # Zeros that wait for a backward are not used, and it may leave those that are watched as they are.
        is_used = run.consumed.covers(self.param_groups) and not run.consumed.zeroed
        refuses = self.on_base_step == "raise" and (is_used or self.param_groups[0][ACTIVE] == 0)
        if self.on_base_step == "ignore" or (run.warned_about_base_step and not refuses) or self._changes_nothing():
            return
        what = f"{type(self).__name__}.step() finds no loss function, no closure and no finished passes, so that it is "
        what += f"a plain {type(self.base_optimizer).__name__} step: nothing is perturbed"
        if is_used:
            what += ", and the gradients are those that the last step has used already"
        if refuses:
            raise RuntimeError(f"{what}. {_WAYS_TO_STEP}")
        # a loop that mixes steps of both kinds knows what it does, unless one follows the other on the same gradients
        run.warned_about_base_step = True
        warnings.warn(what, stacklevel=5)

    def _changes_nothing(self) -> bool:
        """Whether a step of the base changes no weight: torch.distributed.checkpoint makes state by steps with lr 0."""
        return self._rates_are_zero() or all(g is None for g in take(self._params()))

    # what graph_step asks

    def why_not_capturable(self, scaler: Any) -> str | None:
        """Return why no step can be captured, if so; `scaler` is the GradScaler or None. Methods extend it."""
        run, base = self._run, self.base_optimizer
        if self._find_ranks().are_several:
            return "it is taken by several processes"
        if run.module_state.any_cumulative():
            return "batch norm with momentum=None reads its counter on the host"
        if run.generators:
            return "generators= are not part of a capture, so every replay would draw the same numbers"
        reads = self.check_finite or scaler is not None or not all(g.get("capturable") for g in base.param_groups)
        return not_in_a_kernel(base) if reads and not is_fusable(base) else None

    def static_outputs(self) -> list[tuple[Any, str]]:
        """Return attributes, by holder and name, that a step sets to tensors which every replay leaves as well."""
        # the backup may be another after a step without a graph, but a captured one has its address
        return [(self._run, name) for name in ("last_grad_norm", "perturbed_losses", "found_inf", "backup")]

    def _discard(self) -> None:
        self._run.discard()
        self._forget_scaler()

    def _replayed(self) -> None:
        self._warn_about_schedule(self.param_groups[0][TAKEN])
        self._run.consumed.set(self.param_groups)
