"""The laws can fail: each turns red for a method with a fault of the kind that it is there to find."""

import copy
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from laws import LAWS, Cell, Subject
from methods import WAYS
from test_captures import recorder  # noqa: F401
from test_host_reads import as_on_a_device  # noqa: F401
from test_losses_that_differentiate import penalty_and_reentrant_checkpoint

from fastsam import SAM, LookSAM
from fastsam.testing import references
from fastsam.two_pass import batch, losses, optimizer, passes
from fastsam.two_pass.gradients import take

MODULES = [importlib.import_module(file.stem) for file in sorted(Path(__file__).parent.glob("test_*.py"))
           if file.stem != "test_planted_faults"]  # fmt: skip


class PerturbsTooFar(SAM):
    def radius(self, group):
        return super().radius(group) * (1 + 1e-6)


class DropsTheBackup(SAM):
    def perturb(self, ascent, k):
        norm = super().perturb(ascent, k)
        self._run.drop_backup()
        return norm


class KeepsStatistics(SAM):
    def step(self, *args, **keywords):
        self._run.module_state.rewind = lambda: None
        return super().step(*args, **keywords)


class LeavesAllTraces(SAM):
    def step(self, *args, **keywords):
        self._run.module_state.put_back = lambda: None
        return super().step(*args, **keywords)


class MovesStorage(SAM):
    def after_step(self, skipped):
        for p in self._params():
            p.data = p.data.clone()


class DrawsAnew(SAM):
    def perturb(self, ascent, k):
        self._run.first_draws = None
        return super().perturb(ascent, k)


class TellsHooksTwice(SAM):
    def after_step(self, skipped):
        for hook in self.base_optimizer._optimizer_step_post_hooks.values():
            hook(self.base_optimizer, (), {})


class ThawsParameters(SAM):
    def after_step(self, skipped):
        for p in self._params():
            p.requires_grad_(True)


class FreezesInThePasses(SAM):
    def passes(self, batch):
        self._params()[0].requires_grad_(False)
        return super().passes(batch)

    def after_step(self, skipped):
        self._params()[0].requires_grad_(True)


class ObeysNoGrad(SAM):
    def step(self, *args, **keywords):
        return super().step(*args, **keywords) if torch.is_grad_enabled() else None


class TakesTheNormByGroup(SAM):
    def perturb(self, ascent, k):
        groups = {id(group): [i for i, g in enumerate(ascent.groups) if g is group] for group in ascent.groups}
        norms = {key: ascent.take(rows).norm() for key, rows in groups.items()}
        return ascent.add(
            [g * (self.radius(group) / norms[id(group)]) for g, group in zip(ascent.grads, ascent.groups, strict=True)]
        )


class PerturbsEverything(SAM):
    def perturbed(self):
        return [True] * len(self._params())

    def radius(self, group):
        return 0.1


class DecaysWithoutAGradient(SAM):
    def after_step(self, skipped):
        for p in self._params():
            if p.grad is None:
                p.mul_(0.99)


class AddsToScaledGradients(SAM):
    def combine(self, ascent, d):
        for d_n in d:
            d_n.add_(1e-3)


class IgnoresClipping(SAM):
    def step(self, *args, clip_grad_norm=None, **keywords):
        return super().step(*args, **keywords)


class TakesEveryStep(SAM):
    def _update(self, grad_scale, found_inf, is_counted=True):
        self.check_finite = False
        super()._update(grad_scale, None, is_counted)


class SkipsWithoutADirection(SAM):
    def skip(self):
        return ~torch.isfinite(self.last_grad_norm)


class WaitsForTheNorm(SAM):
    def perturb(self, ascent, k):
        return torch.tensor(super().perturb(ascent, k).item())


class HidesItsState(LookSAM):
    def set_state(self, param, name, value, keep):
        self._run.deferred_state[id(param), name] = value.clone()


class CountsDrawsByItself(SAM):
    count = 0

    def perturb(self, ascent, k):
        ascent.step = self.count = self.count + 1
        return super().perturb(ascent, k)


class ForgetsMoments(SAM):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "state": {}})


class SavesNoMoments(SAM):
    def state_dict(self):
        return {**super().state_dict(), "state": {0: {"momentum_buffer": torch.ones(())}}}


class IsItsOwnCopy(SAM):
    def __deepcopy__(self, memo):
        return self


class CountsInPython(SAM):
    def combine(self, ascent, d):
        self._calls = getattr(self, "_calls", 0) + 1
        for d_n in d:
            d_n.mul_(1 + self._calls / 100)


class CountsInTheDefaultDtype(SAM):
    def combine(self, ascent, d):
        for d_n in d:
            d_n.mul_(torch.tensor(1 / 3).double())


class TakesTheScaleForKnown(SAM):
    def perturb(self, ascent, k):
        norm = super().perturb(ascent, k)
        self._run.grad_scale = 1.0
        return norm


class PerturbsInEveryPhase(SAM):
    def check_groups(self):
        super().check_groups()
        self._run.is_active = True


class HasARadiusOfZero(SAM):
    def has_radius(self):
        return True


class AddsToANeedlessPass(SAM):
    def _enter_descent(self, sync):
        if self._is_needless:
            self._run.before_single = take(self._params())
        super()._enter_descent(sync)


class GrowsWithItsAge(SAM):
    age = 0

    def step(self, *args, **keywords):
        self.age += 1
        return super().step(*args, **keywords)

    def radius(self, group):
        return super().radius(group) * (1 + self.age / 100)


class ForgetsTheScale(SAM):
    def radius(self, group):
        return self.option(group, "rho")


class CountsNoSkips(SAM):
    def _count_taken(self, counts):
        super()._count_taken({} if bool(self._run.found_inf) else counts)


class TakesTheBasesSteps(SAM):
    def _check_base_step(self):
        pass


class ComputesAllGradients(SAM):
    def _needed_in_ascent(self):
        return None


class ReportsAnotherLoss(SAM):
    def after_step(self, skipped):
        self._run.perturbed_losses = [losses.Losses(torch.zeros(()))]


class StepsAgainInSecondStep(SAM):
    def second_step(self, zero_grad=False):
        super().second_step()
        self.base_optimizer.step()
        self.zero_grad()


class CallsNoClosure(SAM):
    def step(self, *args, **keywords):
        return super().step(*args[1:] if self._run.pairs else args, **keywords)


class HasADefault(SAM):
    same_rng = True


def count_weights_twice(monkeypatch):
    """Weighted sums are divided by twice the sum of the weights."""
    monkeypatch.setattr(losses, "_at_least_something", lambda total: 2 * total)


def read_no_weights(monkeypatch):
    """Nobody looks at the weights' values."""
    monkeypatch.setattr(losses, "_is_readable", lambda tensor: False)


def refer_to_the_whole_radius(monkeypatch):
    """The references know of no scale."""
    monkeypatch.setattr(references, "scale_of", lambda *_: 1.0)


def leave_marks(monkeypatch):
    """The loss function gets the marks of the batch."""
    monkeypatch.setattr(batch, "_unmarked", lambda node: node)


def see_no_change(monkeypatch):
    """Nobody looks whether a tensor of the batch was changed."""
    monkeypatch.setattr(batch, "_versions", lambda tensors: [])


def lose_gradients(monkeypatch):
    """A closure may lose gradients that are there."""
    monkeypatch.setattr(optimizer, "refuse_fresh", lambda *_: None)


def keep_casts(monkeypatch):
    """Nobody but autocast itself drops its casts."""
    clear = torch.clear_autocast_cache

    def clear_for_autocast():
        if sys._getframe(1).f_globals["__name__"] == "torch.amp.autocast_mode":
            clear()

    monkeypatch.setattr(torch, "clear_autocast_cache", clear_for_autocast)


def follow_nobody(monkeypatch):
    """Steps of the base that others call are not seen."""
    monkeypatch.setattr(passes, "follow_steps", lambda *_: None)


def refer_to_the_base(monkeypatch):
    monkeypatch.setitem(references.REFERENCES, SAM, lambda step: step.look(step.batch)[1])


FAULTS = {
    "test_training_equals_the_papers_equations": PerturbsTooFar,
    "test_a_step_that_fails_leaves_weights_and_moments_and_can_be_taken_again": DropsTheBackup,
    "test_a_step_that_fails_leaves_the_models_state_of_before_the_step": KeepsStatistics,
    "test_every_forward_starts_from_what_the_step_found_and_the_first_ones_traces_stay": LeavesAllTraces,
    "test_a_pass_that_fails_rewinds_to_what_the_step_found": KeepsStatistics,
    "test_an_interrupt_at_a_call_boundary_leaves_the_weights_of_before_or_after": DropsTheBackup,
    "test_a_step_is_the_reference_and_everything_is_put_back": refer_to_the_base,
    "test_a_step_cut_short_anywhere_is_taken_or_is_not": DropsTheBackup,
    "test_a_step_of_the_base_from_perturbed_weights_is_refused": follow_nobody,
    "test_storage_never_moves_and_the_base_sees_the_weights_of_before": MovesStorage,
    "test_all_passes_draw_the_same_numbers_and_the_first_ones_draws_count": DrawsAnew,
    "test_hooks_fire_once_in_order": TellsHooksTwice,
    "test_flags_modes_and_storage_stay": ThawsParameters,
    "test_user_code_in_a_loss_finds_the_gradients_that_it_finds_without_us": FreezesInThePasses,
    "test_a_callers_no_grad_does_not_reach_into_the_passes": ObeysNoGrad,
    "test_a_cut_into_groups_changes_nothing": TakesTheNormByGroup,
    "test_a_group_may_stay_out_of_the_perturbation": PerturbsEverything,
    "test_a_frozen_parameter_counts_as_if_the_optimizer_did_not_have_it": DecaysWithoutAGradient,
    "test_a_parameter_without_a_gradient_stays_and_changes_nothing": DecaysWithoutAGradient,
    "test_tied_weights_count_once": PerturbsTooFar,
    "test_a_scaler_changes_nothing_but_the_scale": AddsToScaledGradients,
    "test_clipping_limits_the_final_gradient_alone": IgnoresClipping,
    "test_a_final_gradient_that_is_not_finite_skips_the_step": TakesEveryStep,
    "test_an_overflow_under_a_scaler_skips_the_step_and_halves_the_scale": TakesEveryStep,
    "test_an_ascent_gradient_that_is_not_finite_means_the_bases_step": SkipsWithoutADirection,
    "test_autocast_may_be_inside_the_loss_function_or_around_the_steps": keep_casts,
    "test_a_step_reads_nothing_on_the_host": WaitsForTheNorm,
    "test_training_resumes_bit_for_bit": HidesItsState,
    "test_the_rounding_of_16_bit_weights_resumes_bit_for_bit": CountsDrawsByItself,
    "test_the_bases_checkpoint_loads_as_if_its_optimizer_were_wrapped": ForgetsMoments,
    "test_a_plain_base_loads_the_checkpoint": SavesNoMoments,
    "test_copies_go_on_by_themselves": IsItsOwnCopy,
    "test_captured_steps_are_the_eager_ones_bit_for_bit": CountsInPython,
    "test_torchs_default_dtype_changes_no_number": CountsInTheDefaultDtype,
    "test_a_nested_batch_is_cut_like_its_tensors": leave_marks,
    "test_a_batch_that_the_loss_changes_in_place_is_refused": see_no_change,
    "test_a_step_of_the_base_consumes_the_gradients": lose_gradients,
    "test_a_norm_is_without_a_scale_that_contexts_were_not_told": TakesTheScaleForKnown,
    "test_an_inactive_step_is_the_bases_bit_for_bit_and_at_its_price": PerturbsInEveryPhase,
    "test_a_step_of_radius_zero_is_inactive": HasARadiusOfZero,
    "test_a_needless_second_pass_is_paid_and_changes_nothing": AddsToANeedlessPass,
    "test_from_its_start_on_a_schedule_is_the_method_bit_for_bit": GrowsWithItsAge,
    "test_a_scaled_radius_is_that_of_the_equations": ForgetsTheScale,
    "test_a_schedule_resumes_in_its_phase_bit_for_bit": GrowsWithItsAge,
    "test_all_micro_batches_of_a_step_are_in_one_phase": PerturbsInEveryPhase,
    "test_a_skipped_step_counts_in_every_phase": CountsNoSkips,
    "test_check_step_knows_schedules": refer_to_the_whole_radius,
    "test_a_step_that_would_be_the_bases_is_refused_and_changes_nothing": TakesTheBasesSteps,
    "test_gradients_that_a_step_has_used_are_not_stepped_with_again": TakesTheBasesSteps,
    "test_gradients_that_no_perturbation_needs_are_computed_once": ComputesAllGradients,
    "test_it_is_the_loss_of_all_rows_at_the_perturbed_weights": ReportsAnotherLoss,
    "test_other_ways_leave_none": ReportsAnotherLoss,
    "test_a_base_step_leaves_none": ReportsAnotherLoss,
    "test_step_after_first_step_is_second_step": StepsAgainInSecondStep,
    "test_a_closure_of_a_framework_may_clip_what_passes_have_left": CallsNoClosure,
    "test_nothing_that_an_optimizer_sets_has_a_default_in_its_class": HasADefault,
    "test_equal_weights_are_the_mean": count_weights_twice,
    "test_terms_count_what_they_weigh": count_weights_twice,
    "test_what_cannot_be_weighed_is_refused_and_changes_nothing": read_no_weights,
}
"""For each law a method that breaks it, or a function that breaks what it stands on."""

GIVEN = {"copier": copy.deepcopy, "use": penalty_and_reentrant_checkpoint, "total": None, "kind": "negative"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_law_turns_red_for_a_method_that_breaks_it(name, request, choose, monkeypatch):
    choose("torch")
    fault = FAULTS[name]
    test = next(getattr(module, name) for module in MODULES if hasattr(module, name))
    row = "looksam" if inspect.isclass(fault) and issubclass(fault, LookSAM) else "sam"
    # in the first way that the law takes
    cell = next(c for way in WAYS if not test.law.reasons(c := Cell(Subject(row), "sgd", way)))
    if inspect.isclass(fault):
        cell = cell._replace(cls=fault)
    else:
        fault(monkeypatch)
    names = [name for name in inspect.signature(test).parameters if name != "cell"]
    fixtures = {name: GIVEN[name] if name in GIVEN else request.getfixturevalue(name) for name in names}
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(cell, **fixtures)


def test_every_law_has_its_fault():
    assert set(FAULTS) == {name.partition(".")[2] for name in LAWS}
