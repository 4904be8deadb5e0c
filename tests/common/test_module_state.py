"""The law of module state: every forward of a step starts from what the step found; its first pass's traces stay."""

import warnings

import pytest
import torch
from laws import PLAIN, law
from moving import Moving, OwnNorm, differences
from problems import batches, losses_of, mlp
from torch import nn
from training import Training

from fastsam import GSAM, MSAM, SAM
from fastsam.two_pass import module_state

TAKEN = 3
"""Steps before: LookSAM's next step has a second pass."""
STATISTICS = ("running_", "num_batches")
SKIPS = PLAIN | {
    "vmap refuses forwards that move other buffers": lambda cell: cell.subject.variant == "batched",
    "its teacher averages buffers of one size": lambda cell: cell.subject.loss == "mesa",
    "it may leave one row, which batch norm refuses": lambda cell: cell.subject.variant == "strict",
}


def moving(cell, **options):
    model = Moving()
    return Training(cell, model=model, keep=model.kept, **options)


@law(skips=SKIPS)
def test_every_forward_starts_from_what_the_step_found_and_the_first_ones_traces_stay(cell):
    training = moving(cell).train(TAKEN)
    model, pairs = training.model, len(training.opt.passes(training.batch))
    found = model.now()
    model.before, model.after = [], []
    training.step()
    forwards = len(model.before) // pairs
    assert forwards >= 2
    for first in range(0, len(model.before), forwards):
        for i in range(first, first + forwards):
            assert not differences(model.before[i], model.before[first])
        assert differences(model.after[first], model.before[first]), "nothing has moved"
        left = model.after[first - forwards] if first else found
        # statistics of several pairs may start together
        assert not differences(model.before[first], left, leave_out=STATISTICS if first else ())
    last = model.after[len(model.after) - forwards]
    assert not differences(model.now(), last, leave_out=STATISTICS if pairs > 1 else ())


@law(skips=SKIPS | {"the first pass is the caller's": lambda cell: cell.way == "two_steps"})
def test_a_pass_that_fails_rewinds_to_what_the_step_found(cell):
    training = moving(cell).train(TAKEN)
    model, found = training.model, training.model.now()
    n_forwards = 2 * len(training.opt.passes(training.batch))
    for failing in range(n_forwards):
        calls = []

        def losses(*batch, calls=calls, failing=failing):
            result = training.losses(*batch)
            calls.append(1)
            if len(calls) > failing:
                raise MemoryError
            return result

        with pytest.raises(MemoryError):
            training.step(losses)
        assert not differences(model.now(), found)
        training.opt.zero_grad()


@pytest.mark.parametrize("zeroes", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_closure_on_top_of_pairs_that_fails_or_is_refused_rewinds_to_before_them(choose, zeroes, fails):
    choose("torch")
    model, (x, y) = Moving(), batches(1)[0]
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, keep=model.kept)
    found = model.now()
    for context in (opt.ascent, opt.descent):
        with context():
            losses_of(model)(x, y).mean().backward()

    def closure():
        if zeroes:
            opt.zero_grad()
        losses_of(model)(x, y).mean().backward()
        if fails:
            raise MemoryError

    with pytest.raises(MemoryError if fails else RuntimeError):
        opt.step(closure)
    assert not differences(model.now(), found)


def by_two_steps(opt, losses, x, y):
    losses(x, y).mean().backward()
    opt.first_step(zero_grad=True)
    losses(x, y).mean().backward()
    opt.second_step(zero_grad=True)


def test_an_undone_first_step_leaves_what_the_first_pass_left(choose):
    choose("torch")
    model, (x, y) = Moving(), batches(1)[0]
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, keep=model.kept)
    for _ in range(2):
        by_two_steps(opt, losses_of(model), x, y)
    losses_of(model)(x, y).mean().backward()
    opt.first_step()
    losses_of(model)(x, y)
    opt.restore()
    assert not differences(model.now(), model.after[-2])


@pytest.mark.parametrize("bn_update", ["mean", "sequential"])
def test_pairs_of_shards_merge_statistics_at_the_step_as_one_call_does(backend, bn_update):
    """Equal shards: between contexts nobody says how many rows a pair has."""
    models = [mlp(batchnorm=True) for _ in range(2)]
    options = {"rho": 0.1, "num_shards": 3, "bn_update": bn_update, "lr": 0.1}
    some, other = (MSAM(m.parameters(), torch.optim.SGD, model=m, **options) for m in models)
    for x, y in batches(3):
        some.step(losses_of(models[0]), x, y)
        for shard in zip(x.chunk(3), y.chunk(3), strict=True):
            for context in (other.ascent, other.descent):
                with context():
                    (losses_of(models[1])(*shard).mean() / 3).backward()
        other.step()
        other.zero_grad()
        for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_pairs_of_a_plain_sam_move_statistics_one_after_the_other(choose):
    choose("torch")
    model, plain = mlp(batchnorm=True), mlp(batchnorm=True)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    for x, y in batches(3):
        losses_of(plain)(x, y)
        for context in (opt.ascent, opt.descent):
            with context():
                losses_of(model)(x, y).mean().backward()
    opt.step()
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


class Backbone(nn.Module):
    """A frozen part far larger than the trained one; `moves` says from which forward on the former is moved."""

    def __init__(self, width, moves):
        super().__init__()
        self.frozen, self.head = nn.Linear(6, width).requires_grad_(False), nn.Linear(width, 3)
        self.moves, self.forwards = moves, 0

    def forward(self, x):
        self.forwards += 1
        if self.forwards > self.moves:
            self.frozen.bias.data.mul_(0.9)
        return self.head(self.frozen(x))


def test_a_moving_parameter_among_far_more_frozen_ones_is_refused_by_name_and_taken_in_keep(choose):
    choose("torch")
    x, y = batches(1, dtype=torch.float32)[0]
    model = Backbone(4, moves=0)
    model.other = nn.Linear(64, 64).requires_grad_(False)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    before = model.head.weight.clone()
    with pytest.raises(RuntimeError, match=r"'bias' of shape \(4,\).*keep="):
        opt.step(losses_of(model), x, y)
    assert torch.equal(model.head.weight, before)
    bias = model.frozen.bias.clone()
    SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, keep=[model.frozen.bias]).step(losses_of(model), x, y)
    assert torch.equal(model.frozen.bias, bias * 0.9)


def test_a_parameter_that_begins_to_move_later_is_found_and_said(choose, monkeypatch):
    choose("torch")
    monkeypatch.setattr(module_state, "SEARCHED_EVERY", 6)
    x, y = batches(1, dtype=torch.float32)[0]
    model = Backbone(4, moves=8)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    for _ in range(5):
        opt.step(losses_of(model), x, y)
    bias = model.frozen.bias.clone()
    with pytest.warns(UserWarning, match="'bias'.*2 steps ago"):
        opt.step(losses_of(model), x, y)
    assert torch.equal(model.frozen.bias, bias * 0.9)
    opt.step(losses_of(model), x, y)
    assert torch.equal(model.frozen.bias, bias * 0.9 * 0.9)


@pytest.mark.parametrize("change", ["added", "converted", "scripted"])
def test_layers_that_change_after_the_optimizer_was_built(choose, change):
    choose("torch")
    model, witness = mlp(batchnorm=True), mlp(batchnorm=True)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0, model=model)
    x, y = batches(1)[0]
    opt.step(losses_of(model), x, y)
    witness(x)
    for m in (model, witness):
        if change == "added":
            m.append(OwnNorm(3).double())
        elif change == "converted":
            m[1].momentum = 0.3
            m[0] = nn.Sequential(m[0], nn.BatchNorm1d(8).double())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                m[1] = torch.jit.script(m[1])
    opt.step(losses_of(model), x, y)
    witness(x)
    for a, b in zip(model.buffers(), witness.buffers(), strict=True):
        assert torch.equal(a, b)


def test_several_modules(choose):
    choose("torch")
    body, head = mlp(batchnorm=True), nn.Sequential(OwnNorm(3), nn.Linear(3, 2)).double()
    opt = GSAM([*body.parameters(), *head.parameters()], torch.optim.SGD, lr=0.1, model=[body, head])
    x, _ = batches(1)[0]
    opt.step(lambda x: head(body(x)).square().sum(1), x)
    assert body[1].num_batches_tracked == 1
    torch.testing.assert_close(head[0].running_mean, 0.1 * mlp(batchnorm=True)(x).mean(0))


def test_other_tensors_of_a_model_cost_nothing_and_stay(choose):
    """Expanded and sparse buffers are kept by reference; a trajectory loss inside the model keeps its own state."""
    choose("torch")
    from fastsam import SAF

    model = mlp(dtype=torch.float32)
    model.register_buffer("expanded", torch.zeros(1).expand(10**9))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.criterion = SAF(10**7, 3, history_dtype=torch.float16)
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    x, y = batches(1, dtype=torch.float32)[0]
    opt.step(lambda x, y: nn.functional.cross_entropy(model[:3](x), y, reduction="none"), x, y)
    assert not opt._run.module_state._before_step._tensors


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "net"}, "model must be a torch.nn.Module or a sequence of them, got str"),
        ({"model": [mlp(), 3]}, "got Sequential, int"),
        ({"keep": torch.zeros(2)}, "keep must be a list or tuple, got Tensor"),
        ({"keep": [7]}, r"keep takes tensors, and objects with state_dict\(\) and load_state_dict\(\), got int"),
        ({"generators": torch.Generator()}, "generators must be a list or tuple, got Generator"),
        ({"generators": [0]}, "generators takes torch.Generator.*got int"),
    ],
)
def test_bad_arguments_say_so(options, error):
    with pytest.raises(TypeError, match=error):
        SAM(mlp().parameters(), torch.optim.SGD, lr=0.1, **options)
