"""The engine: one step of every two-pass method, and the hooks in which methods differ.

    1  first forward and backward at w on the batch    -> g       check, passes, needs_gradient, has_first_pass
    2  mean of g over the ranks that share a perturbation
    3  w <- w + eps(g)                                            perturb
    4  second forward and backward                     -> g_adv   has_second_pass, select
    5  d = g_adv, or what the method makes of it and g            combine
    6  restore w, bit for bit
    7  unscale and clip d
    8  base optimizer's step from w with d                        skip
    9  counters, and the method's own state                       after_step

Module state and random draws are the first pass's alone, and after an exception everything is as before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed.dtensor import laid_out_as
from fastsam.two_pass.ascent import Ascent, as_dense
from fastsam.two_pass.batch import Batch, batch_size
from fastsam.two_pass.capture import Capturable, watch
from fastsam.two_pass.gradients import ConsumedMark, clear, put, take
from fastsam.two_pass.hooks import MethodHooks
from fastsam.two_pass.interrupts import held_back
from fastsam.two_pass.loss_function import LossFunction, check_losses
from fastsam.two_pass.losses import Losses, Pair, StepObjective, joined
from fastsam.two_pass.partial_backward import run_backward
from fastsam.two_pass.restore_step import Update, prepare
from fastsam.two_pass.wrapper import ACTIVE, SEED, STEP, TAKEN


class Engine(MethodHooks, Capturable):
    """What every way of taking a step is made of: the passes, on a batch or on closures, and the update."""

    check_finite: bool

    # passes

    def _start_afresh(self) -> None:
        """Drop whatever earlier passes left in p.grad."""
        self._forget_pairs()
        clear(self._params())

    def _pair(
        self,
        first_pass: Callable[[], Any],
        second_pass: Callable[[], Any],
        sync: bool = True,
        is_partial: bool = False,
    ) -> Any:
        """Run both passes, of which the second adds to p.grad, and return what the first one run returned.

        Args:
            first_pass: runs forward and backward.
            second_pass: runs forward and backward at perturbed weights.
            sync: reduce p.grad between DDP's ranks in the second pass; without, that of a later pair does it for both.
            is_partial: the first pass's backward leaves some gradients out.
        """
        run = self._run
        if type(self).is_warm is Capturable.is_warm:  # which otherwise tells steps apart by itself
            watch(self._has_two_passes)
        if not self._has_two_passes():
            return self._single(first_pass, sync)
        first = self._ascend(first_pass, is_partial) if self.has_first_pass() else None
        if not self.has_first_pass():
            run.skip_ascent(self.param_groups)
        run.enter_descent(self._perturb_params, self._syncs(sync))
        with torch.enable_grad():
            second = second_pass()
        self._combine()
        run.add_aside()
        run.leave_descent()
        return first if self.has_first_pass() else second

    def _ascend(self, first_pass: Callable[[], Any], is_partial: bool) -> Any:
        run = self._run
        self._enter_ascent(is_partial)
        with torch.enable_grad():
            first = first_pass()
        run.leave_ascent()
        _refuse_no_backward(first, run.ascent_grads)
        return first

    def _single(self, only_pass: Callable[[], Any], sync: bool) -> Any:
        """Run the only pass of a step without a second one."""
        self._run.enter_single(self.param_groups, self._syncs(sync))
        with torch.enable_grad():
            result = only_pass()
        _refuse_no_backward(result, take(self._params()))
        self._leave_single()
        return result

    def _passes_on_batch(self, loss_fn: LossFunction, batch: Batch, scaler: Any) -> Tensor:
        """Run all passes of a step and return the first ones' mean loss; the update restores the weights."""
        self._start_on_batch(scaler)
        return self._run_pairs(loss_fn, batch, scale_by(scaler))

    def _run_pairs(
        self,
        loss_fn: LossFunction,
        batch: Batch,
        scale: Callable[[Tensor], Tensor],
        own: Callable[[Tensor], Any] | None = None,
        finishes: bool = False,
    ) -> Tensor:
        """Run the pairs of a batch one after the other and return the first passes' mean loss.

        Args:
            loss_fn: the user's.
            batch: its arguments.
            scale: multiplies the losses by a GradScaler's scale, if there is one.
            own: the caller's backward, in place of ours.
            finishes: restore the weights after each pair and count it, since no update follows.
        """
        run = self._run
        pairs = self.passes(batch) if run.is_active else [Pair(batch)]
        objective = StepObjective(pairs, self._params(), not self._reduces_each_pair())
        losses: list[Losses] = []
        norms: list[Tensor | None] = []
        run.perturbed_losses = []
        for i, pair in enumerate(pairs):
            # The weights are still those that the pair before has perturbed.
            run.restore()
            run.share, perturbs = pair.share, self._has_two_passes()
            # The last backward reduces the sum of all pairs between DDP's ranks.
            losses.append(self._pair_on_batch(loss_fn, pair.batch, objective, i, scale, i == len(pairs) - 1, own))
            norms.append(run.last_grad_norm)
            if finishes and perturbs:
                run.restore()
                run.finish_pair()
        run.last_grad_norm = self.norm_of_pairs(norms)
        return joined(losses)

    def _reduces_each_pair(self) -> bool:
        """Whether gradients of one pair are reduced between ranks, or combined, before those of the next are there."""
        return self._run.parallel_model.is_sharded or self._combines()

    def _start_on_batch(self, scaler: Any) -> None:
        """Drop what earlier passes left, and note the scale that the backward passes of this step will have."""
        self._start_afresh()
        if scaler is not None and scaler.is_enabled():
            # a copy, since the scaler changes its own in update()
            self._run.grad_scale = scaler.scale(torch.ones((), dtype=torch.float32, device=self._run.skipped.device))

    def _pair_on_batch(
        self,
        loss_fn: LossFunction,
        batch: tuple[Any, ...],
        objective: StepObjective,
        i: int,
        scale: Callable[[Tensor], Tensor],
        sync: bool,
        own: Callable[[Tensor], Any] | None,
    ) -> Losses:
        """Run both passes on a part of the batch; return the losses of the first, or of the only one.

        Args:
            loss_fn: the user's.
            batch: its arguments, the part's rows.
            objective: what the losses of the parts make.
            i: which part it is.
            scale: multiplies the losses.
            sync: reduce p.grad between DDP's ranks in the second pass.
            own: the caller's backward, in place of ours.
        """
        n = batch_size(batch) if batch else None
        may_be_scalar = not self.needs_rows()
        loss_fn.begin_pair()
        only_first = not self._has_two_passes()
        needed = None if only_first else self._needed_in_ascent()
        kept: list[Losses] = []
        untouched = ConsumedMark()

        def losses_of_all() -> Losses:
            untouched.set(self.param_groups)
            losses = check_losses(loss_fn(*batch), n, may_be_scalar=may_be_scalar)
            if not losses.rows.dim() and not untouched.covers(self.param_groups, also_missing=True):
                raise TypeError("the loss function has run backward itself; leave that out, or use opt.step(closure)")
            return losses

        def backward(loss: Tensor, leaves: list[Tensor] | None = None) -> None:
            if own is not None:
                self._run_callers(own, loss, leaves)
            else:
                run_backward(scale(loss), leaves)

        def first_pass() -> None:
            losses = losses_of_all()
            kept.append(losses.detach())
            backward(objective.of_second(i, kept[0], losses) if only_first else objective.of_first(losses), needed)

        def second_pass() -> None:
            losses = self.select(loss_fn, batch, kept[0]) if kept else losses_of_all()
            self._run.perturbed_losses.append((losses.of_all or losses).detach())
            if not kept:
                kept.append(losses.detach())
            backward(objective.of_second(i, kept[0], losses))

        self._pair(first_pass, second_pass, sync, is_partial=needed is not None)
        return kept[0]

    def _run_callers(self, own: Callable[[Tensor], Any], loss: Tensor, leaves: list[Tensor] | None) -> None:
        """Let the caller's function run backward from the loss, or from a leaf in its place where part is left out.

        What it multiplies the loss by, a GradScaler's scale or the share of a micro-batch, is the gradient that arrives
        at the loss.
        """
        untouched = ConsumedMark()
        factors: list[Tensor] = []
        untouched.set(self.param_groups)
        is_partial = leaves is not None and not self._run.parallel_model.reduce_in_backward
        given = loss.detach().requires_grad_() if is_partial else loss

        def arrive(gradient: Tensor) -> None:
            factors.append(gradient.detach())
            # within the caller's function, whose losses may refuse any other backward
            if is_partial:
                run_backward(loss, leaves, gradient)

        handle = given.register_hook(arrive)
        try:
            own(given)
        finally:
            handle.remove()
        if factors:
            self._run.note_factor(factors[0])
        if not (is_partial and factors) and untouched.covers(self.param_groups, also_missing=True):
            raise RuntimeError(
                "backward= left no gradient in p.grad: it must run backward from the tensor that it is given. An "
                "engine that keeps gradients and takes the step by itself, such as DeepSpeed's, cannot be used with "
                f"{type(self).__name__}"
            )

    def _unscale_and_update(self, scaler: Any, clip_grad_norm: float | None) -> None:
        if scaler is not None and clip_grad_norm is not None:
            scaler.unscale_(self._scaler_target)
        if clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._params(), clip_grad_norm)
        if scaler is not None:
            scaler.step(self._scaler_target)
        else:
            self._update(None, None)

    # the parts of a pass

    def _enter_ascent(self, is_partial: bool = False) -> None:
        # DDP, which waits for every gradient, leaves them as they are on each rank where some are not computed.
        ranks = self._run.parallel_model
        is_local = ranks.is_local or ranks.is_inside_no_sync or (ranks.reduce_in_backward and is_partial)
        self._run.enter_ascent(self.param_groups, self.same_rng, is_local)

    def _needed_in_ascent(self) -> list[Tensor] | None:
        """The parameters whose gradients a first backward of ours is to compute; None for all."""
        if not self.has_first_pass() or not self._run.parallel_model.may_skip_gradients:
            return None
        needs = self.needs_gradient()
        if all(needs):
            return None
        return [p for p, is_needed in zip(self._params(), needs, strict=True) if is_needed]

    def _combines(self) -> bool:
        return self._run.is_active and type(self).combine is not MethodHooks.combine

    def _syncs(self, sync: bool) -> bool:
        if not self._combines():
            return sync
        # each rank combines gradients of its own where it perturbs by its own
        return not self._run.parallel_model.is_local

    @torch.no_grad()
    def _perturb_params(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Perturb the weights in place along the ascent gradient."""
        run = self._run
        found = self._ascent_gradients(params, grads)
        run.last_grad_norm = None
        if found:
            ascent = self._ascent(params, found)
            norm = self.perturb(ascent, 0)
            run.last_grad_norm = None if norm is None else run.without_factor(norm)
            run.ascent = ascent if self._combines() else None
        self._count_step()

    def _ascent_gradients(self, params: list[Tensor], grads: list[Tensor | None]) -> dict[int, Tensor | None]:
        """The gradients to perturb along, by position in group order; averaged over ranks if nobody has yet."""
        if not self.has_first_pass():
            return {i: None for i, wanted in enumerate(self.perturbed()) if wanted and params[i].requires_grad}
        may_have_one = [g is not None or p.requires_grad for p, g in zip(params, grads, strict=True)]
        wanted = zip(self.perturbed(), self.needs_gradient(), may_have_one, strict=True)
        positions = [i for i, (perturbed, needed, may) in enumerate(wanted) if perturbed and needed and may]
        found: Any = [None if (g := grads[i]) is None else as_dense(g) for i in positions]
        if self._run.ascent_is_local:
            found = self._run.parallel_model.average([params[i] for i in positions], found)
        return {i: g for i, g in zip(positions, found, strict=True) if g is not None}

    def _ascent(self, params: list[Tensor], grads: dict[int, Any]) -> Ascent:
        groups = [group for group in self.param_groups for _ in group["params"]]
        return Ascent.of(
            {i: (params[i], g, groups[i]) for i, g in grads.items()},
            step=groups[0][STEP],
            seed=groups[0][SEED],
            n_params=len(params),
            backup_of=self._run.backup_of,
            rounds=self.stochastic_rounding,
        )

    @torch.no_grad()
    def _combine(self) -> None:
        """Let the method make its own of what a pass has left in p.grad."""
        if not self._combines():
            return
        run, params = self._run, self._params()
        known = {} if run.ascent is None else dict(zip(run.ascent.indices, run.ascent.grads, strict=True))
        perturbed = self.perturbed()
        # a tensor without a gradient in one of the passes has zeros there
        positions = [i for i, p in enumerate(params) if perturbed[i] and (i in known or p.grad is not None)]
        for i in positions:
            p = params[i]
            p.grad = torch.zeros_like(p) if p.grad is None else laid_out_as(p, as_dense(p.grad))
        ascent = self._ascent(params, {i: params[i].grad for i in positions})
        d, ascent.grads = (
            ascent.grads,
            [known[i] if i in known else torch.zeros_like(g) for i, g in zip(positions, ascent.grads, strict=True)],
        )
        if positions:
            self.combine(ascent, d)
        if run.parallel_model.is_local:
            trained = [p for p in params if p.requires_grad]
            put(trained, run.parallel_model.average_over_all(trained, take(trained)))

    # the end of a step

    def _finish_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take the step that pairs, or a plain backward, have left in p.grad."""
        run = self._run
        is_counted = bool(run.pairs) or run.in_second_step
        if not run.pairs:
            run.perturbed_losses = []
        if not is_counted and not self._has_two_passes():
            run.params, run.last_grad_norm = self._params(), None
            # a gradient that is combined in part is none to try again with
            run.failed = self._combines()
            self._combine()
            is_counted = not self._only_makes_state()
        # under a GradScaler whose scale the ascent was not told
        holds_scale = run.has_passes and found_inf is not None and run.grad_scale is None
        self._update(grad_scale, found_inf, is_counted)
        if holds_scale and run.last_grad_norm is not None:
            # where unscale_() has taken it out of p.grad, nobody knows it any more
            run.last_grad_norm = None if grad_scale is None else run.last_grad_norm / grad_scale

    def _only_makes_state(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint makes a base's state, at a rate of 0."""
        return not self.state and self._rates_are_zero()

    def _rates_are_zero(self) -> bool:
        """Whether all learning rates are 0, of those that can be read without waiting for a device."""
        rates: list[Any] = [group.get("lr") for group in self.param_groups]
        if any(lr is None or (isinstance(lr, Tensor) and lr.is_cuda) for lr in rates):
            return False
        return all(float(lr) == 0 for lr in rates)

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None, is_counted: bool = True) -> None:
        """Restore the weights and take the base optimizer's step, unless the final gradient is not finite."""
        run = self._run
        if is_counted:
            run.parallel_model.compare(self.param_groups)
        run.module_state.merge_pairs()
        skip = self.skip() if run.is_active else None
        base, is_alone = self.base_optimizer, not run.is_active
        update = prepare(base, run.backup, grad_scale, found_inf, self.check_finite, skip, is_alone)
        calls, found_inf = list(update.calls), update.found_inf
        if found_inf is not None:
            calls.append(partial(run.skipped.add_, (found_inf != 0).to(run.skipped.device)))
        before, is_active = self.param_groups[0], is_counted and run.is_active
        counts = {TAKEN: before[TAKEN] + is_counted, ACTIVE: before[ACTIVE] + is_active}
        rest: list[Callable[[], Any]] = [
            partial(self._finish_update, update),
            partial(self._count_taken, counts),
            run.finish,
        ]
        rest += [partial(run.follow, prepare_own) for prepare_own in run.followers.values()]
        held_back(partial(run.commit, calls, rest, update.is_foreign))

    @torch.no_grad()
    def _finish_update(self, update: Update) -> None:
        run = self._run
        run.found_inf, run.base_stepped = update.found_inf, update.is_run
        run.parallel_model.reshard()
        if run.is_active:
            self.after_step(update.found_inf)

    def _count_taken(self, counts: dict[str, int]) -> None:
        for group in self.param_groups:
            group.update(counts)
        self._run.consumed.set(self.param_groups)

    def _forget_scaler(self) -> None:
        for holder in (self, self._scaler_target, self.base_optimizer):
            holder.__dict__.pop("grad_scale", None)
            holder.__dict__.pop("found_inf", None)


def scale_by(scaler: Any) -> Callable[[Tensor], Tensor]:
    """Return what multiplies a loss by a GradScaler's scale; without one the loss stays as it is."""
    return _as_it_is if scaler is None else scaler.scale


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _refuse_no_backward(returned: Any, grads: list[Tensor | None]) -> None:
    """Raise RuntimeError where a closure returned a loss, but has not run backward from it."""
    if isinstance(returned, Tensor) and returned.requires_grad and all(g is None for g in grads):
        raise RuntimeError("the closure returned a loss, but no parameter has a gradient; call backward() in it")
