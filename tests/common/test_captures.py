"""The law of captures: captured steps are the eager ones, bit for bit; and who cannot be captured says why."""

import pytest
import torch
from kernel_cases import DEVICE, kernels
from laws import all_cells, law
from problems import assert_same, snapshot
from training import Training, moments

import fastsam
from fastsam import graph_step
from fastsam.graph import recorder as recorders
from fastsam.graph.plain_step import PlainOptimizerStep

if kernels is None:
    pytest.skip("triton is not installed", allow_module_level=True)

WARM_UP, REPLAYS = 1, 2


@pytest.fixture
def recorder(monkeypatch, choose):
    """What records: on the CPU a stand-in for CUDA graphs."""
    choose("triton")
    if DEVICE == "cuda":
        pytest.skip("the laws train on the CPU")
    from recorded_work import RecordedWork

    made = RecordedWork()
    monkeypatch.setattr(recorders, "recorder_for", lambda params, batch: made)
    return made


REFUSED = {
    "the base step is RMSprop's own, which reads the device": (
        lambda cell: cell.base == "rmsprop",
        "the base step is RMSprop's own",
    ),
    "strict=True reads how many rows there are": (
        lambda cell: cell.subject.variant == "strict",
        "strict=True reads the device",
    ),
}
"""Why a cell cannot be captured, which cells these are, and what the error says."""

SKIPS = {reason: leaves_out for reason, (leaves_out, _) in REFUSED.items()}
OTHER_WAYS = {"graph_step is a way of its own, that of a loss function": lambda cell: cell.way != "loss_fn"}


def graphed(training):
    return graph_step(training.opt, training.losses, *training.batch, warmup=WARM_UP)


def started(cell):
    """A training whose loss, if it has one, hears the past: several steps make an epoch, each of which is captured."""
    training = Training(cell, torch.float32, dropout=0.3, steps_per_epoch=4)
    fastsam.set_backend("torch")  # the interpreter takes its time
    training.train(3 if training.loss is None else 8)
    fastsam.set_backend("triton")
    return training


def take(training, step):
    training.begin()
    loss = step(*training.batch)
    training.taken += 1
    return loss


@law(skips=SKIPS | OTHER_WAYS, backends=("triton",))
def test_captured_steps_are_the_eager_ones_bit_for_bit(cell, recorder):
    torch.manual_seed(6)
    training = started(cell)
    step, found = graphed(training), []
    while step.replays < REPLAYS:
        found.append(take(training, step))
        assert len(found) < 2 * (WARM_UP + REPLAYS), "the step is not captured"
    torch.manual_seed(6)
    eager = started(cell)
    plain = PlainOptimizerStep(eager.opt, fused=True) if cell.subject.optimizer is None else eager.opt
    expected = [take(eager, lambda *batch: plain.step(eager.losses, *batch)) for _ in found]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same(training.model, snapshot(eager.model))
    assert training.opt.state_dict()["param_groups"] == eager.opt.state_dict()["param_groups"]
    states = moments(training), moments(eager)
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    if hasattr(training.loss, "teacher"):
        assert_same(training.loss.teacher, snapshot(eager.loss.teacher))


def some_cell(leaves_out):
    """The first cell that is left out for this reason alone."""
    return next(
        cell
        for cell in all_cells()
        if cell.way == "loss_fn" and leaves_out(cell) and sum(other(cell) for other in SKIPS.values()) == 1
    )


@pytest.mark.parametrize("reason", REFUSED)
def test_who_cannot_be_captured_says_why(reason, recorder):
    leaves_out, words = REFUSED[reason]
    training = started(some_cell(leaves_out))
    with pytest.raises((ValueError, RuntimeError), match=words):  # noqa: PT012
        step = graphed(training)
        for _ in range(WARM_UP + 1):
            take(training, step)
