"""What every two-pass method shares: three ways to take a step, and weights that always come back.

w                             first pass  -> g      (batch-norm statistics and dropout draws are this pass's)
w + eps(g)                    second pass -> d      (a method says what eps is: `_perturb`)
w, bit for bit                base step with d
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam.distributed.ddp import PerturbSync, check_perturb_sync
from fastsam.distributed.dtensor import Spread, laid_out_as, local, spread
from fastsam.two_pass.batch import batch_size, check_losses
from fastsam.two_pass.capture import Capturable
from fastsam.two_pass.gradients import clear, refuse_fresh
from fastsam.two_pass.passes import PassOptimizer
from fastsam.two_pass.restore_step import is_fusable, not_in_a_kernel, update
from fastsam.two_pass.state import Stage
from fastsam.two_pass.wrapper import SEED, STEP


@dataclass
class Ascended:
    """The tensors to perturb, those of groups with perturb=True that got an ascent gradient, in parallel lists.

    `indices` count all tensors in group order; `step` and `seed` address random numbers. Of a DTensor the lists hold
    this rank's entries, and `spreads` how they lie on the ranks.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    groups: list[dict[str, Any]]
    indices: tuple[int, ...]
    spreads: list[Spread | None]
    step: int
    seed: int

    def take(self, rows: list[int]) -> "Ascended":
        """Return the tensors at these positions of the lists alone."""
        return Ascended(
            [self.weights[i] for i in rows],
            [self.grads[i] for i in rows],
            [self.groups[i] for i in rows],
            tuple(self.indices[i] for i in rows),
            [self.spreads[i] for i in rows],
            self.step,
            self.seed,
        )


class TwoPassOptimizer(PassOptimizer, Capturable):
    """A base optimizer whose gradient is taken at perturbed weights. Methods derive from it; see `SAM`."""

    # tells GradScaler.step to hand its scale and its found_inf to our step
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        knobs: dict[str, Any],
        *,
        model: nn.Module | None,
        perturb_sync: PerturbSync,
        same_rng: bool,
        stochastic_rounding: Any,
        check_finite: bool,
        seed: int,
        base_kwargs: dict[str, Any],
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_perturb_sync(perturb_sync)
        if stochastic_rounding not in ("auto", True, False):
            raise ValueError(f"stochastic_rounding must be 'auto', True or False, got {stochastic_rounding!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an integer, got {seed!r}")
        super().__init__(params, base_optimizer, knobs, seed, base_kwargs)
        self.model = model
        self.perturb_sync = perturb_sync
        self.same_rng = same_rng
        self.stochastic_rounding = bool(stochastic_rounding)
        self.check_finite = check_finite
        self._start()
        if model is not None and not {id(p) for p in self._params()} & {id(p) for p in model.parameters()}:
            warnings.warn(
                "none of the optimizer's parameters belongs to model; build the optimizer after to_empty() and the "
                "like, which replace parameters",
                stacklevel=3,
            )

    # what a method adds

    @abstractmethod
    def _perturb(self, ascended: Ascended) -> Tensor:
        """Perturb the weights in place and return the gradient norm."""

    def _chosen(self) -> list[bool]:
        """For each parameter in group order whether it is to be perturbed."""
        return [self.knob(group, "perturb") for group in self.param_groups for _ in group["params"]]

    def _skip_for(self) -> Tensor | None:
        """A 0-dim bool tensor that is true if the step is to be skipped for the method's own reasons."""
        return None

    def _perturbs_nothing(self) -> bool:
        """Whether it is known before the second pass that it would repeat the first."""
        return False

    def step(
        self,
        closure: Callable[..., Any] | None = None,
        *batch: Any,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
    ) -> Any:
        """Take one step.

        `step(loss_fn, *batch)` runs both passes: `loss_fn(*batch)` returns per-sample losses, shape [n], without
        backward; fastsam takes their mean, runs backward, unscales and clips. Gradients that are there are discarded.
        `step(closure)` is torch's convention: the closure runs zero_grad and backward itself, once in each pass.
        `step()` finishes `ascent()`/`descent()` pairs; without any it is the base optimizer's step.

        Args:
            closure: the loss function or closure.
            batch: tensors, or nested dicts, lists and tuples of them, of one leading size n.
            scaler: GradScaler for `step(loss_fn, *batch)`; call its `update()` afterwards, as always. In the other
                ways pass this optimizer to `scaler.step`.
            clip_grad_norm: largest 2-norm of the final gradient, for `step(loss_fn, *batch)`.

        Returns:
            The first pass's mean loss, detached, on its device; what a torch closure returned, as it is; else None.

        Raises:
            TypeError: the loss function returned something else than n losses, or the batch holds no tensor.
            ValueError: leading sizes of the batch differ, or clip_grad_norm is not positive.
            RuntimeError: a wrong order of calls, a closure under a GradScaler, or fresh gradients before a closure.
            Weights are what they were before the step, whatever is raised.
        """
        run = self._run
        try:
            self._check_step(closure, batch, scaler, clip_grad_norm)
        except BaseException:
            self._forget_scaler()
            raise
        try:
            if closure is None:
                self._update(self.__dict__.get("grad_scale"), self.__dict__.get("found_inf"))
                return None
            if not batch and run.pairs:  # a framework's closure on top of finished pairs
                with torch.enable_grad():
                    loss = closure()
            elif not batch:
                loss = self._two_passes(closure, closure)
            else:
                loss = self._passes_on_batch(closure, batch, scaler)
                if scaler is not None or clip_grad_norm is not None:
                    return self._unscale_and_update(loss, scaler, clip_grad_norm)
            self._update(None, None)
            return loss
        except BaseException:
            run.abort()
            if closure is not None:
                clear(self._params())  # half of a gradient is no gradient
            self._forget_scaler()
            raise

    def _check_step(self, closure: Any, batch: tuple, scaler: Any, clip_grad_norm: float | None) -> None:
        run = self._run
        if not run.in_second_step:
            run.refuse("step()", Stage.ASCENT, Stage.ASCENDED, Stage.DESCENT, Stage.FIRST)
        if run.failed and not batch:
            run.require("step()", Stage.IDLE)
        if closure is not None and not callable(closure):
            raise TypeError(f"step() takes a loss function or closure first, got {type(closure).__name__}")
        if closure is not None and not batch:
            self._check_form("step(closure)")
        if not batch and (scaler is not None or clip_grad_norm is not None):
            raise TypeError("scaler= and clip_grad_norm= go with step(loss_fn, *batch) alone")
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"clip_grad_norm must be positive, got {clip_grad_norm}")
        if closure is not None and not batch and "found_inf" in self.__dict__:
            raise RuntimeError(
                "scaler.step(opt, closure) cannot unscale the second pass's gradients; use opt.step(loss_fn, *batch, "
                "scaler=scaler), or opt.ascent() and opt.descent() and then scaler.step(opt)"
            )
        if batch:
            batch_size(batch)
        elif closure is not None and not run.pairs:
            refuse_fresh(run.consumed, self.param_groups)
        elif closure is None and not run.pairs and not run.in_second_step:
            self._warn_about_base_step()

    def _two_passes(self, first_pass: Callable[[], Any], second_pass: Callable[[], Any]) -> Any:
        """Run both passes from a clean p.grad; the weights stay perturbed for the update to restore."""
        self._start_afresh()
        return self._pair(first_pass, second_pass)

    def _start_afresh(self) -> None:
        """Drop whatever earlier passes left in p.grad."""
        self._run.pairs, self._run.failed = 0, False
        clear(self._params())

    def _pair(self, first_pass: Callable[[], Any], second_pass: Callable[[], Any], sync: bool = True) -> Any:
        """Run both passes, of which the second adds to p.grad, and return what the first returned.

        Args:
            first_pass: runs forward and backward.
            second_pass: runs forward and backward at perturbed weights.
            sync: reduce p.grad between DDP's ranks in the second pass; without, that of a later pair does it for both.
        """
        run = self._run
        self._enter_ascent()
        with torch.enable_grad():
            first = first_pass()
        run.leave_ascent()
        if isinstance(first, Tensor) and first.requires_grad and all(g is None for g in run.ascent_grads):
            raise RuntimeError("the closure returned a loss, but no parameter has a gradient; call backward() in it")
        if self._perturbs_nothing():
            run.use_ascent_gradient()
            run.last_grad_norm = None
            self._count_step()
            return first
        run.enter_descent(self._perturb_params, sync)
        with torch.enable_grad():
            second_pass()
        run.leave_descent()
        return first

    def _passes_on_batch(self, loss_fn: Callable, batch: tuple, scaler: Any) -> Tensor:
        """Run all passes of a step and return the first one's mean loss. Methods override it."""
        self._start_afresh()
        return self._pair_on_batch(loss_fn, batch, scaler).mean()

    def _pair_on_batch(
        self, loss_fn: Callable, batch: tuple, scaler: Any, weight: float = 1.0, sync: bool = True
    ) -> Tensor:
        """Run both passes on a batch, the mean loss of the second times `weight`; return the first one's losses."""
        n = batch_size(batch)
        kept: list[Tensor] = []

        def backward(losses: Tensor, weight: float = 1.0) -> None:
            loss = losses.mean() if weight == 1 else losses.mean() * weight
            (loss if scaler is None else scaler.scale(loss)).backward()

        def first_pass() -> None:
            losses = check_losses(loss_fn(*batch), n)
            backward(losses)
            kept.append(losses.detach())

        second_backward = partial(backward, weight=weight)
        self._pair(first_pass, lambda: self._second_pass(loss_fn, batch, kept[0], second_backward), sync)
        return kept[0]

    def _second_pass(self, loss_fn: Callable, batch: tuple, first: Tensor, backward: Callable[[Tensor], None]) -> None:
        """Run the second pass: by default on the whole batch. Methods override it.

        Args:
            loss_fn: the user's loss function.
            batch: its arguments.
            first: the first pass's losses, shape [n], detached.
            backward: takes per-sample losses and runs backward from their mean.
        """
        backward(check_losses(loss_fn(*batch), len(first)))

    def _unscale_and_update(self, loss: Tensor, scaler: Any, clip_grad_norm: float | None) -> Tensor:
        if scaler is not None and clip_grad_norm is not None:
            scaler.unscale_(self._scaler_target)
        if clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._params(), clip_grad_norm)
        if scaler is not None:
            scaler.step(self._scaler_target)
        else:
            self._update(None, None)
        return loss

    @torch.no_grad()
    def _perturb_params(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        run = self._run
        groups = [group for group in self.param_groups for _ in group["params"]]
        found = self._ascent_gradients(params, grads)
        chosen = list(found)
        if not chosen:
            run.last_grad_norm = None
            self._count_step()
            return
        run.last_grad_norm = self._perturb(
            Ascended(
                [_as_real(local(params[i])) for i in chosen],
                [_as_real(local(laid_out_as(params[i], g))) for i, g in found.items()],
                [groups[i] for i in chosen],
                tuple(chosen),
                [spread(params[i]) for i in chosen],
                step=self.param_groups[0][STEP],
                seed=self.param_groups[0][SEED],
            )
        )
        self._count_step()

    def _ascent_gradients(self, params: list[Tensor], grads: list[Tensor | None]) -> dict[int, Tensor]:
        """The gradients to perturb along, dense, by position in group order; averaged over ranks if nobody has yet."""
        may_have_one = [g is not None or p.requires_grad for p, g in zip(params, grads, strict=True)]
        rows = [i for i, wanted in enumerate(self._chosen()) if wanted and may_have_one[i]]
        found: Sequence[Tensor | None] = [None if (g := grads[i]) is None else _as_dense(g) for i in rows]
        if self._run.ascent_is_local:
            found = self._run.replicas.average([params[i] for i in rows], found)
        return {i: g for i, g in zip(rows, found, strict=True) if g is not None}

    def _count_step(self) -> None:
        """Move on to the next step's random numbers."""
        next_step = self.param_groups[0][STEP] + 1
        for group in self.param_groups:
            group[STEP] = next_step

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Restore the weights and take the base optimizer's step, unless the final gradient is not finite."""
        run = self._run
        found_inf = update(self.base_optimizer, run.backup, grad_scale, found_inf, self.check_finite, self._skip_for())
        run.replicas.reshard()
        run.found_inf = found_inf
        if found_inf is not None:
            run.skipped += (found_inf != 0).to(run.skipped.device)
        run.consumed.set(self.param_groups)
        run.finish()

    def _names(self) -> list[str]:
        """Names of all parameters in group order, from the groups or else from the model."""
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if not names and self.model is not None:
            name_of = {id(p): name for name, p in self.model.named_parameters()}
            names = [name_of.get(id(p), "") for p in self._params()]
        if not names or not all(names):
            raise ValueError("this option needs parameter names: pass model=, or model.named_parameters() as params")
        return names

    def _warn_about_base_step(self) -> None:
        run = self._run
        if run.warned_about_base_step or all(float(group.get("lr", 1)) == 0 for group in self.param_groups):
            return
        run.warned_about_base_step = True
        warnings.warn(
            f"{type(self).__name__}.step() without a loss function, a closure or an ascent()/descent() pair is a plain "
            f"{type(self.base_optimizer).__name__} step; nothing is perturbed",
            stacklevel=5,
        )

    # what graph_step asks

    def _obstacle(self, scaler: Any) -> str | None:
        run, base = self._run, self.base_optimizer
        if run.replicas.are_several:
            return "it is taken by several processes"
        if run.statistics.any_cumulative():
            return "batch norm with momentum=None reads its counter on the host"
        reads = self.check_finite or scaler is not None or not all(g.get("capturable") for g in base.param_groups)
        return not_in_a_kernel(base) if reads and not is_fusable(base) else None

    def _outcomes(self) -> list[tuple[Any, str]]:
        # the backup may be another after a step without a graph, but a captured one has its address
        return [(self._run, "last_grad_norm"), (self._run, "found_inf"), (self._run, "backup")]

    def _discard(self) -> None:
        self._run.discard()
        self._forget_scaler()

    def _replayed(self) -> None:
        self._run.consumed.set(self.param_groups)

    def _forget_scaler(self) -> None:
        for holder in (self, self._scaler_target):
            holder.__dict__.pop("grad_scale", None)
            holder.__dict__.pop("found_inf", None)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _as_dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor  # sums the entries of an uncoalesced one
