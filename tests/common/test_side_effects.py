"""What a step must leave alone or do once: statistics, random draws, schedulers, hooks, compiled code, host reads."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from methods import WAYS, by_contexts, by_loss_function, by_two_steps
from problems import batches, cnn, largest_difference, losses_of, mlp
from torch import nn
from torch.optim import lr_scheduler

from fastsam import SAM


class Normed(nn.Module):
    def __init__(self, momentum, track=True):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 8).double()
        self.norm = nn.BatchNorm1d(8, momentum=momentum, track_running_stats=track).double()
        self.frozen = nn.BatchNorm1d(8).double().eval()
        self.head = nn.Linear(8, 3).double()

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.head(torch.tanh(self.frozen(self.norm(self.inner(x)))))


@pytest.mark.parametrize("way", WAYS.values())
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_statistics_are_those_of_one_forward_at_the_true_weights(choose, way, momentum, track):
    choose("torch")
    model, witness = Normed(momentum, track).train(), Normed(momentum, track).train()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, model=model, lr=0.1)
    for x, y in batches(4):
        witness.load_state_dict({**witness.state_dict(), **dict(model.named_parameters())})
        with torch.no_grad():
            witness(x)
        way(opt, losses_of(model), x, y)
        for (name, got), expected in zip(model.named_buffers(), witness.buffers(), strict=True):
            assert torch.equal(got, expected), name
    if track:
        assert model.norm.num_batches_tracked == 4


def test_without_model_the_statistics_are_the_users(backend):
    model = Normed(0.1).train()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    by_loss_function(opt, losses_of(model), *batches(1)[0])
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("same_rng", [True, False])
def test_both_passes_draw_the_same_dropout_masks_unless_they_are_not_to(choose, same_rng):
    choose("torch")
    model, draws = mlp(dropout=0.5), []
    model[2].register_forward_hook(lambda m, args, out: draws.append(out == 0))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.01, lr=0.1, same_rng=same_rng)
    torch.manual_seed(0)
    for x, y in batches(3):
        opt.step(losses_of(model), x, y)
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        assert torch.equal(first, second) is same_rng
    assert not torch.equal(draws[0], draws[2])


def test_several_backwards_in_a_pair_replay_all_their_draws(backend):
    model, draws = mlp(dropout=0.5), []
    model[2].register_forward_hook(lambda m, args, out: draws.append(out == 0))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.01, lr=0.1)
    for context in (opt.ascent(), opt.descent()):
        with context:
            for x, y in batches(3):
                losses_of(model)(x, y).mean().backward()
    assert all(map(torch.equal, draws[:3], draws[3:]))


@pytest.mark.parametrize("way", [by_loss_function, by_contexts, by_two_steps])
def test_compiled_models_run_without_recompiling(backend, way):
    torch._dynamo.reset()
    model, eager = cnn(), cnn()
    compiled = torch.compile(model, backend="aot_eager")
    opts = [SAM(m.parameters(), torch.optim.SGD, rho=0.05, model=w, lr=0.05, momentum=0.9)
            for m, w in ((model, compiled), (eager, eager))]  # fmt: skip
    scheduler = lr_scheduler.CosineAnnealingLR(opts[0], 10)
    lr_scheduler.CosineAnnealingLR(opts[1], 10)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            torch.manual_seed(seed)
            x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
            way(opts[0], losses_of(compiled), x, y)
            scheduler.step()
    for seed in range(4):
        torch.manual_seed(seed)
        x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
        opts[1].param_groups[0]["lr"] = 0.05 * (1 + torch.cos(torch.tensor(seed * torch.pi / 10)).item()) / 2
        way(opts[1], losses_of(eager), x, y)
    assert largest_difference(model, eager) < 1e-5
    torch._dynamo.reset()


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)], milestones=[3]
    ),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_on_either_object_work_without_warnings(choose, kind, on_base):
    choose("torch")
    model, plain = mlp(), mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    reference_opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor|To get the last learning rate|.*epoch parameter")
        schedulers = [SCHEDULERS[kind](opt.base_optimizer if on_base else opt), SCHEDULERS[kind](reference_opt)]
        for way, (x, y) in zip([*WAYS.values()] * 2, batches(2 * len(WAYS)), strict=True):
            way(opt, losses_of(model), x, y)
            losses_of(plain)(x, y).mean().backward()
            reference_opt.step()
            for s in schedulers:
                s.step(1.0) if kind == "plateau" else s.step()
            group, expected = opt.param_groups[0], reference_opt.param_groups[0]
            assert (group["lr"], group["momentum"]) == (expected["lr"], expected["momentum"])


def test_a_tensor_learning_rate_keeps_its_identity(backend):
    model, plain = mlp(), mlp()
    lr = torch.tensor(0.1)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=lr, momentum=0.9)
    other = SAM(plain.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    for i, (x, y) in enumerate(batches(3)):
        opt.step(losses_of(model), x, y)
        scheduler.step()
        other.param_groups[0]["lr"] = torch.tensor(0.1).item() * 0.5**i
        other.step(losses_of(plain), x, y)
    assert opt.param_groups[0]["lr"] is lr
    assert largest_difference(model, plain) < 1e-7


def test_a_patched_base_step_is_the_one_that_runs(backend):
    model, calls = mlp(), []
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    original = base.step
    base.step = lambda *args: calls.append(1) or original(*args)
    opt = SAM.wrap(base, rho=0.1)
    by_loss_function(opt, losses_of(model), *batches(1)[0])
    assert calls == [1]


def test_scratch_is_one_copy_of_the_perturbed_weights_and_stays(backend):
    model = mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    addresses = set()
    for x, y in batches(3):
        opt.step(losses_of(model), x, y)
        addresses.add(tuple(t.data_ptr() for t in opt._run.backup.tensors))
        assert sum(t.numel() for t in opt._run.backup.tensors) == sum(p.numel() for p in model.parameters())
    assert len(addresses) == 1


def test_averaged_models_and_clipping_between_passes(backend):
    from torch.optim.swa_utils import AveragedModel

    model = cnn()
    averaged = AveragedModel(model)
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, model=model, lr=0.01)
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.first_step(zero_grad=True)
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.second_step(zero_grad=True)
        averaged.update_parameters(model)
    assert averaged.n_averaged == 3
