"""The laws of restoring: weights come back bit for bit, and a step that fails leaves everything else alone too."""

import pytest
import torch
from faults import Interrupt, Losses, PlantedError, fault_after, fault_in_base_step
from laws import PLAIN, law
from training import Training, moments

TAKEN = 3
"""Steps before: state and scratch exist, and LookSAM's next step has a second pass."""


def started(cell, **keywords):
    return Training(cell, dropout=0.3, **keywords).train(TAKEN)


def assert_equal(found, expected, what):
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: {name} differs by {(found[name] - value).abs().max()}"


def faults_of(training, saved):
    """Contexts and losses of every fault in a step, by name."""
    counted = Losses(training)
    with fault_after(training.opt, "perturb") as perturbations:
        training.step(counted)
    training.load(saved)
    nothing = lambda: fault_after(training.opt, "perturb")  # noqa: E731
    for call in range(1, counted.calls + 1):
        error = PlantedError() if call % 2 else KeyboardInterrupt()
        yield f"forward {call}", nothing(), Losses(training, call, error), error
    for call in range(1, len(perturbations) + 1):
        error = PlantedError()
        yield f"perturbation {call}", fault_after(training.opt, "perturb", call, error), training.losses, error
    error = PlantedError()
    yield "the base's step", fault_in_base_step(training.opt, error), training.losses, error


@law(skips=PLAIN, backends=("torch", "triton"))
def test_a_step_that_fails_leaves_weights_and_moments_and_can_be_taken_again(cell):
    training = started(cell)
    saved, before, kept = training.state(), training.weights(), moments(training)
    modes = [(p.requires_grad, p.data_ptr()) for p in training.model.parameters()]
    after = training.train(1).weights()
    training.load(saved)
    for what, fault, losses, error in faults_of(training, saved):
        with pytest.raises(type(error)), fault:
            training.step(losses)
        if cell.way == "two_steps":
            training.opt.restore()  # what fails between the calls is the caller's to handle
        assert all(map(torch.equal, training.weights(), before)), f"{what}: weights"
        assert [(p.requires_grad, p.data_ptr()) for p in training.model.parameters()] == modes, what
        assert_equal(moments(training), kept, what)
        training.opt.zero_grad()
    again = training.load(saved).train(1).weights()
    assert all(map(torch.equal, again, after)), "the step taken again"


@law(
    skips=PLAIN | {"the first pass is the caller's own, before any call of ours": lambda cell: cell.way == "two_steps"},
    # no kernel of ours touches a model's state
)
def test_a_step_that_fails_leaves_the_models_state_of_before_the_step(cell):
    training = started(cell)
    saved = training.state()
    for what, fault, losses, error in faults_of(training, saved):
        with pytest.raises(type(error)), fault:
            training.step(losses)
        assert_equal(training.model.state_dict(), saved["model"], what)
        training.opt.zero_grad()


@law(skips=PLAIN, backends=("torch", "triton"))
def test_an_interrupt_at_a_call_boundary_leaves_the_weights_of_before_or_after(cell, request):
    """At many boundaries for SAM around SGD or with --all-cells, and else at a few."""
    training = started(cell, dtype=torch.float32)
    saved, before = training.state(), training.weights()
    with Interrupt() as count:
        training.step()
    after, outcomes = training.weights(), []
    assert not torch.equal(before[0], after[0])
    sample = {"torch": 24 if cell.subject.row == "sam" and cell.base == "sgd" else 6, "triton": 3}[cell.backend]
    sample = 100 if request.config.getoption("all_cells") else sample
    for n in range(1, count.seen + 1, max(1, count.seen // sample)):
        training.load(saved)
        interrupt, raised = Interrupt(n), None
        try:
            with interrupt:
                training.step()
        except KeyboardInterrupt as error:
            raised = error
        if interrupt.seen < n:
            break  # with warm caches there are fewer calls than were counted
        # Python itself swallows what is raised while it disposes of a generator or a weak reference, and reports it
        assert raised is not None or interrupt.swallowed, "an interrupt was swallowed"
        if cell.way == "two_steps":
            training.opt.restore()
        now = list(zip(training.weights(), before, after, strict=True))
        outcomes.append("before" if all(torch.equal(w, b) for w, b, _ in now) else "after")
        whole = outcomes[-1] == "before" or all(torch.equal(w, a) for w, _, a in now)
        assert whole, f"lost weights: {raised}"
        training.opt.restore()  # drops an ascent that waits for its descent
        training.opt.zero_grad()
    assert outcomes.count("before") > outcomes.count("after")
    training.load(saved).step()  # the optimizer still works
    assert all(map(torch.equal, training.weights(), after))


@law()
def test_storage_never_moves_and_the_base_sees_the_weights_of_before(cell):
    training = Training(cell)
    base, seen = getattr(training.opt, "base_optimizer", training.opt), []
    views = [p.detach() for p in training.model.parameters()]
    training.train(2)  # without a hook SGD and AdamW step in our kernel
    base.register_step_pre_hook(lambda *_: seen.append(training.weights()))
    for _ in range(2):
        before = training.weights()
        training.step()
        assert all(map(torch.equal, seen[-1], before))
    assert len(seen) == 2
    assert all(
        v.data_ptr() == p.data_ptr() and torch.equal(v, p)
        for v, p in zip(views, training.model.parameters(), strict=True)
    )
