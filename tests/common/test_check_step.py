"""`fastsam.testing.check_step`: silent for right loops of every method, and clear about what a wrong one breaks."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from laws import PLAIN, law
from methods import OPTIONS, WAYS, by_contexts
from problems import assert_same, batches, losses_of, mlp, snapshot
from training import Training, moments

from fastsam import ESAM, GSAM, SAM, TwoPassOptimizer
from fastsam.methods import METHODS
from fastsam.testing import check_step

TAKEN = 2


@law(
    skips=PLAIN | {
        "a loss with a memory is not seen as in a step": lambda cell: cell.subject.loss,
        "the first pass draws before any call of ours": lambda cell: cell.way == "two_steps",
        "between contexts nobody says how many rows a pair has":
            lambda cell: cell.subject.row == "msam" and cell.way == "contexts",
    },
)  # fmt: skip
def test_a_step_is_the_reference_and_everything_is_put_back(cell):
    # shards side by side draw together
    training = Training(cell, dropout=0.0 if cell.subject.variant == "batched" else 0.3).train(TAKEN)
    for _ in range(2):  # LookSAM's two kinds of steps
        before, kept = snapshot(training.model), copy.deepcopy(training.opt.state_dict())
        draws, state = torch.get_rng_state(), moments(training)
        batch = training.batch
        take = lambda batch=batch: WAYS[cell.way](training.opt, training.losses, *batch)  # noqa: E731
        report = check_step(training.opt, training.losses, *batch, take_step=take)
        assert report.weight_error < 1e-8
        assert report.scale == 1
        assert_same(training.model, before)
        assert torch.equal(torch.get_rng_state(), draws)
        assert all(torch.equal(value, moments(training)[name]) for name, value in state.items())
        assert str(kept) == str(training.opt.state_dict())
        training.step()


def test_every_dtype_and_groups_of_their_own(backend):
    for dtype in (torch.float32, torch.bfloat16):
        model = mlp(dtype, batchnorm=True)
        groups = [{"params": model[:2].parameters(), "rho": 0.5, "adaptive": True}, {"params": model[2:].parameters()}]
        opt = SAM(groups, torch.optim.AdamW, rho=0.05, model=model, lr=0.01, maximize=True)
        check_step(opt, losses_of(model), *batches(1, dtype=dtype)[0])


@pytest.mark.parametrize("row", [name for name, row in METHODS.items() if row.kind == "optimizer"])
def test_a_group_that_stays_out_of_products_and_norms(choose, row):
    choose("torch")
    model, (x, y) = mlp(batchnorm=True), batches(1)[0]
    groups = [{"params": model[:2].parameters(), "perturb": False}, {"params": model[2:].parameters()}]
    options = {"lr": 0.1, "momentum": 0.9}
    opt = METHODS[row].build(groups, torch.optim.SGD, model=model, base_options=options, **OPTIONS[row])
    for _ in range(2):  # LookSAM's two kinds of steps
        check_step(opt, losses_of(model), x, y)
        opt.step(losses_of(model), x, y)


@pytest.mark.parametrize("clip", [1e-3, 10.0])
def test_clipping_is_a_scale_and_no_fault(choose, clip):
    choose("torch")
    model, (x, y) = mlp(), batches(1)[0]
    opt = SAM(model.parameters(), torch.optim.SGD, model=model, lr=0.1)
    report = check_step(
        opt, losses_of(model), x, y, take_step=lambda: opt.step(losses_of(model), x, y, clip_grad_norm=clip)
    )
    assert (report.scale < 1) is (clip < 1)


def base_alone(opt, losses, x, y):
    losses(x, y).mean().backward()
    opt.base_optimizer.step()


def cleared_base_alone(opt, losses, x, y):
    base_alone(opt, losses, x, y)
    opt.zero_grad()


def another_batch(opt, losses, x, y):
    opt.step(losses, x[:5], y[:5])


def steps_twice(opt, losses, x, y):
    opt.step(losses, x, y)
    opt.base_optimizer.step()


def left_open(opt, losses, x, y):
    losses(x, y).mean().backward()
    opt.first_step(zero_grad=True)


def draws_more(opt, losses, x, y):
    opt.step(losses, x, y)
    random.random()


def forward_more(opt, losses, x, y):
    opt.step(losses, x, y)
    draws = torch.get_rng_state()
    losses(x, y)
    torch.set_rng_state(draws)


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        (base_alone, "took the base optimizer's step"),
        (cleared_base_alone, "took the base optimizer's step"),
        (another_batch, "is off the method's d by"),
        (steps_twice, "the weights are off those of SGD's step with d by"),
        (left_open, r"is not over: it is after first_step\(\), before second_step\(\)"),
        (draws_more, "random generators are not where one forward leaves them"),
        (forward_more, "running_mean, running_var, num_batches_tracked: not as the first pass leaves it"),
    ],
)
def test_what_a_wrong_loop_breaks(choose, loop, said):
    choose("torch")
    model, (x, y) = mlp(batchnorm=True), batches(1)[0]
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, model=model, lr=0.1, momentum=0.9)
    opt.step(losses_of(model), x, y)
    before, state = snapshot(model), copy.deepcopy(opt.state_dict())
    with pytest.raises(AssertionError, match=said):
        check_step(opt, losses_of(model), x, y, take_step=lambda: loop(opt, losses_of(model), x, y))
    assert_same(model, before)
    assert str(state) == str(opt.state_dict())
    by_contexts(opt, losses_of(model), x, y)


def test_a_forgotten_model_is_named(choose):
    choose("torch")
    model, (x, y) = mlp(batchnorm=True), batches(1)[0]
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(AssertionError, match="the optimizer was built without model="):
        check_step(opt, losses_of(model), x, y)


def test_state_that_nobody_sees_is_named(choose):
    choose("torch")
    model, (x, y), seen = mlp(), batches(1)[0], [0]

    def losses(x, y):
        seen[0] += 1
        return F.cross_entropy(model(x), y, reduction="none") * seen[0]

    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    with pytest.raises(AssertionError, match="other losses from the same weights"):
        check_step(opt, losses, x, y)


class Own(TwoPassOptimizer):
    """Perturbs by the gradient itself."""

    def __init__(self, params, base, **keywords):
        super().__init__(params, base, {}, **keywords)

    def perturb(self, ascent, k):
        return ascent.add([g * 0.1 for g in ascent.grads])


def test_a_method_of_ones_own_takes_its_reference(choose):
    choose("torch")
    model, batch = mlp(), batches(1)[0]
    opt = Own(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    with pytest.raises(TypeError, match="there is no reference for Own; pass reference="):
        check_step(opt, losses_of(model), *batch)

    def reference(step, factor=0.1):
        _, g = step.look(step.batch)
        return step.look(step.batch, [factor * g_n for g_n in g])[1]

    check_step(opt, losses_of(model), *batch, reference=reference)
    with pytest.raises(AssertionError, match="off the method's d"):
        check_step(opt, losses_of(model), *batch, reference=lambda step: reference(step, 0.2))


@pytest.mark.parametrize("method", [ESAM, GSAM])
def test_a_reference_of_another_method_is_seen(choose, method, monkeypatch):
    from fastsam.testing import references

    choose("torch")
    model, batch = mlp(), batches(1)[0]
    opt = method(model.parameters(), torch.optim.SGD, rho=0.5, model=model, lr=0.1, seed=3)
    check_step(opt, losses_of(model), *batch)
    monkeypatch.setitem(references.REFERENCES, method, references.sam)
    with pytest.raises(AssertionError, match="off the method's d"):
        check_step(opt, losses_of(model), *batch)


def test_bad_arguments():
    model = mlp()
    with pytest.raises(TypeError, match="opt must be an optimizer of fastsam, got SGD"):
        check_step(torch.optim.SGD(model.parameters()), losses_of(model))
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with opt.ascent(), pytest.raises(RuntimeError, match=r"check_step\(\) cannot be called"):
        check_step(opt, losses_of(model), *batches(1)[0])
