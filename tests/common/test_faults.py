"""The laws of interrupts: whatever cuts a step short, everything is as before it or as after it."""

import gc
import random

import pytest
import torch
from fault_runs import MEND, StepsCutShort
from laws import PLAIN, Cell, Subject, law

from fastsam import SAM
from fastsam.two_pass.stage import Stage

PLANTED = 6
"""Faults in each cell of a run; with --all-cells ten times as many."""


@law(skips=PLAIN)
def test_a_step_cut_short_anywhere_is_taken_or_is_not(cell, request):
    """By one exception or by two in a row; everything means weights, moments, counters, statistics, records, modes."""
    rng = random.Random(str(cell))
    steps = StepsCutShort(cell, taken=rng.choice((0, 3)))
    n_faults = PLANTED * (10 if request.config.getoption("all_cells") else 1)
    for i in range(n_faults):
        # of every two one is near the end, where the update is
        n = rng.randint(1 if i % 2 else int(steps.calls * 0.9), steps.calls)
        then = rng.choice((0, 0, 1, 2, rng.randint(3, 40)))
        steps.plant(n, then, rng.choice((KeyboardInterrupt, MemoryError)), rng.choice(MEND) if then else None)
    steps.take_again("after all")
    assert set(steps.outcomes) & {"before", "after"}


@pytest.mark.parametrize(("row", "base"), [("sam", "rmsprop"), ("esam", "adamw"), ("looksam", "sgd")])
def test_ctrl_c_leaves_a_step_taken_or_not(row, base, choose):
    choose("torch")
    steps = StepsCutShort(Cell(Subject(row), base, "loss_fn"), taken=3)
    seconds, rng = steps.seconds(), random.Random(0)
    sent = tries = 0
    while tries < 30 or (sent <= 5 and tries < 600):
        # a step that was slow when it was timed, on a busy machine, is over before a signal comes
        sent += steps.send_signal(rng.uniform(0, 1.2) * seconds * 0.8 ** (tries // 30))
        tries += 1
    assert sent > 5
    # held back while it runs
    assert steps.outcomes["inside the base's own step"] == 0
    steps.take_again("after all")


def after_first_step(cls=SAM):
    model = torch.nn.Linear(3, 2)
    opt = cls(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = model.weight.detach().clone()
    model(torch.ones(4, 3)).square().mean().backward()
    opt.first_step()
    assert not torch.equal(model.weight, before)
    return model, opt, before


def test_an_optimizer_that_is_dropped_after_first_step_restores(backend):
    model, opt, before = after_first_step()
    del opt
    assert torch.equal(model.weight, before)


def test_an_optimizer_that_is_disposed_of_late_leaves_everything_to_others(backend):
    """In a cycle, as a scheduler makes one, it outlives the last name by steps of another."""
    for leaves in ("ascent", "first_step"):
        model, opt, _ = after_first_step()
        if leaves == "ascent":
            opt.restore()
            context = opt.ascent()
            context.__enter__()
            opt.kept = context
        opt.itself = opt
        gc.disable()
        try:
            opt = None
            context = None
            other = SAM(model.parameters(), torch.optim.RMSprop, rho=0.5, model=model, lr=0.1)
            other.step(lambda x, model=model: model(x).square().sum(1), torch.ones(4, 3))
            torch.rand(3)
            model.weight.grad = torch.ones_like(model.weight)
            before, draws = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
        finally:
            gc.enable()
        gc.collect()
        assert all(map(torch.equal, before, model.parameters()))
        assert torch.equal(draws, torch.get_rng_state())
        assert torch.equal(model.weight.grad, torch.ones_like(model.weight))


class FailsInItsStep(torch.optim.SGD):
    """A base that steps one tensor and fails at the next."""

    def step(self, closure=None):
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise OSError("planted")


def test_a_base_that_fails_in_its_own_step_is_said_to_have(backend):
    model = torch.nn.Linear(3, 2)
    opt = SAM(model.parameters(), FailsInItsStep, rho=0.5, model=model, lr=0.1)
    w, b = (p.detach().clone() for p in model.parameters())

    def losses(x):
        return model(x).square().sum(1)

    with pytest.raises(OSError, match="planted"):
        opt.step(losses, torch.ones(4, 3))
    assert torch.equal(model.weight, w + 1)
    assert torch.equal(model.bias, b)
    calls = (lambda: opt.step(losses, torch.ones(4, 3)), opt.step, opt.ascent().__enter__, opt.first_step)
    for call in calls:
        with pytest.raises(RuntimeError, match=r"inside the base optimizer's own step.*load_state_dict"):
            call()
    state = opt.state_dict()
    opt.zero_grad()
    with opt.ascent():
        pass
    opt.restore()
    with pytest.raises(OSError, match="planted"):
        opt.step(losses, torch.ones(4, 3))
    opt.load_state_dict(state)
    with opt.ascent():
        losses(torch.ones(4, 3)).mean().backward()
    assert opt._run.stage is Stage.ASCENDED
