"""MESA: the teacher is the moving average of the weights, and costs a forward only where it is heard."""

import copy

import pytest
import torch
import torch.nn.functional as F
from host_reads import NoHostReads
from methods import divergence
from problems import assert_same, batches, cnn, mlp, snapshot
from torch import nn

from fastsam import MESA, SAM
from fastsam.kernels import reference_common

SGD = torch.optim.SGD
X, Y = batches(1, rows=24)[0]


def test_worked_numbers(backend):
    """docs/algorithms.md#moving-average: EMA with decay 0.9 of weights that take four given steps."""
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0]]))
    mesa, opt = MESA(model, decay=0.9), SGD(model.parameters(), lr=0.1)
    mesa.attach(opt)
    averages, wanted = [], [0.99, 1.02, 0.976, 1.033, 0.9733999999999999, 1.0347, 0.95106, 1.03623]
    for g in ((1, -2), (0.5, 0.5), (-1, 1), (2, 0)):
        model.weight.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
        averages += mesa.teacher.weight[0].tolist()
    assert averages == pytest.approx(wanted, abs=1e-15)


def test_closed_form_of_the_average(backend):
    """docs/algorithms.md#invariant-25, both sides of Eq. 11."""
    model, decay, eta = mlp(), 0.8, 0.05
    mesa, opt = MESA(model, decay=decay), SGD(model.parameters(), lr=eta)
    start = [p.detach().clone() for p in model.parameters()]
    gradients = []
    for _ in range(7):
        opt.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        opt.step()
        mesa.update()
    t = len(gradients)
    for k, (v, w) in enumerate(zip(mesa.teacher.parameters(), model.parameters(), strict=True)):
        past = sum((1 - decay ** (t - i)) * eta * gradients[i][k] for i in range(t))
        ahead = sum(decay ** (t - i) * eta * gradients[i][k] for i in range(t))
        torch.testing.assert_close(v, start[k] - past, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(v, w + ahead, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "dict"])
def test_training_equals_the_papers_equations(backend, inputs):
    model, other = mlp(), mlp()
    v = copy.deepcopy(other)
    mesa = MESA(model, lam=0.8, tau=5.0, decay=0.9, start_epoch=1, label_smoothing=0.1)
    opt, reference = SGD(model.parameters(), lr=0.3, momentum=0.9), SGD(other.parameters(), lr=0.3, momentum=0.9)
    mesa.attach(opt)
    for epoch in range(1, 4):
        mesa.set_epoch(epoch)
        for x, y in batches(4, seed=epoch):
            opt.zero_grad()
            given = {"tensor": x, "tuple": (x,), "dict": {"input": x}}[inputs]
            loss = mesa(model(x), y, given)
            loss.backward()
            opt.step()
            reference.zero_grad()
            z = other(x)
            wanted = F.cross_entropy(z, y, label_smoothing=0.1)
            if epoch > 1:
                with torch.no_grad():
                    t = v(x)
                wanted = wanted + 0.8 * divergence(t, z).mean()
            wanted.backward()
            reference.step()
            with torch.no_grad():
                for a, b in zip(v.parameters(), other.parameters(), strict=True):
                    a.mul_(0.9).add_(b, alpha=0.1)
            torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("keywords", [{"lam": 0.0, "start_epoch": 0}, {"start_epoch": 5}])
def test_an_inactive_loss_is_cross_entropy_bit_for_bit_and_asks_no_teacher(backend, keywords):
    """docs/algorithms.md#invariant-12."""
    model, other = mlp(torch.float32, batchnorm=True), mlp(torch.float32, batchnorm=True)
    mesa = MESA(model, decay=0.9, **keywords)
    mesa.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    opt, reference = SGD(model.parameters(), lr=0.3), SGD(other.parameters(), lr=0.3)
    for epoch in range(1, 6):
        mesa.set_epoch(epoch)
        x, y = X.float(), Y
        opt.zero_grad()
        mesa(model(x), y, x).backward()
        opt.step()
        mesa.update()
        reference.zero_grad()
        F.cross_entropy(other(x), y).backward()
        reference.step()
    assert_same(model, snapshot(other))
    # the average goes on all the same
    assert not torch.equal(mesa.teacher[0].weight, model[0].weight)


def test_a_teacher_that_is_the_model_does_not_diverge(backend):
    """docs/algorithms.md#invariant-24."""
    model = mlp()
    mesa = MESA(model, start_epoch=0)
    z = model(X).detach()
    assert float(mesa(z, Y, X) - F.cross_entropy(z, Y)) == pytest.approx(0, abs=1e-14)


def test_the_teacher_is_in_eval_mode_with_averaged_statistics(backend):
    """docs/algorithms.md#r-29: float buffers averaged, the counter copied."""
    model = mlp(batchnorm=True, dropout=0.5)
    holder = nn.ModuleDict({"loss": MESA(model, decay=0.5, start_epoch=0)})
    mesa = holder["loss"]
    holder.train()
    assert not any(m.training for m in mesa.teacher.modules())
    before = mesa.teacher[1].running_mean.clone()
    model(X)
    model(X)
    mesa.update()
    torch.testing.assert_close(mesa.teacher[1].running_mean, 0.5 * before + 0.5 * model[1].running_mean)
    assert int(mesa.teacher[1].num_batches_tracked) == 2
    first, second = mesa(model(X).detach() * 0, Y, X), mesa(model(X).detach() * 0, Y, X)
    assert torch.equal(first, second)  # no dropout
    torch.testing.assert_close(mesa.teacher[1].running_mean, 0.5 * before + 0.5 * model[1].running_mean, rtol=1, atol=1)


def test_no_gradient_reaches_the_teacher_and_it_holds_no_student(backend):
    model = mlp()
    mesa = MESA(model, start_epoch=0)
    mesa(model(X), Y, X).backward()
    assert all(p.grad is None and not p.requires_grad for p in mesa.parameters())
    assert {id(p) for p in mesa.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert {name.split(".")[0] for name in mesa.state_dict()} == {"teacher", "_extra_state"}


def test_a_model_that_differentiates_in_its_forward_has_a_teacher(backend):
    class Sloping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            x = x.detach().requires_grad_()
            z = self.net(x)
            (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=self.training)
            return z + slope[:, :3]

    model = Sloping()
    mesa = MESA(model, start_epoch=0)
    for _ in range(2):
        loss = mesa(model(X), Y, X)
        loss.backward()
        torch.testing.assert_close(loss, F.cross_entropy(model(X), Y))  # it is the model, so far
    assert all(p.grad is None for p in mesa.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_averaged(backend, dtype):
    model = mlp(dtype)
    mesa = MESA(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    wanted = [(v.double() + w.double()) / 2 for v, w in zip(mesa.teacher.parameters(), model.parameters(), strict=True)]
    mesa.update()
    for v, truth in zip(mesa.teacher.parameters(), wanted, strict=True):
        assert torch.equal(v, truth.to(dtype))


def test_the_teacher_runs_in_the_models_precision(backend):
    model = mlp(torch.float32)
    mesa, seen = MESA(model, start_epoch=0), []
    mesa.teacher.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        mesa(z, Y, x)
    mesa(z, Y, x)  # outside of autocast, as losses often are
    mesa(z.float(), Y, x)
    other = MESA(model, start_epoch=0, teacher_dtype=torch.bfloat16)
    other.teacher.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    other(z.float(), Y, x)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("way", ["loss function", "contexts"])
def test_both_passes_of_sam_meet_one_teacher_which_runs_once(backend, way):
    model = mlp()
    mesa, calls = MESA(model, decay=0.9, lam=1.0, start_epoch=0, reduction="none"), []
    mesa.teacher.register_forward_hook(lambda *_: calls.append(1))
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    mesa.attach(opt)
    for step in range(1, 4):
        t, seen = mesa.teacher(X), []
        calls.clear()

        def losses(x, y, seen=seen):
            z = model(x)
            seen.append((z.detach(), mesa(z, y, x)))
            return seen[-1][1]

        if way == "contexts":
            with opt.ascent():
                losses(X, Y).mean().backward()
            with opt.descent():
                losses(X, Y).mean().backward()
            opt.step()
            opt.zero_grad()
        else:
            opt.step(losses, X, Y)
        assert len(calls) == 1
        for z, rows in seen:
            wanted = F.cross_entropy(z, Y, reduction="none") + divergence(t, z)
            torch.testing.assert_close(rows.detach(), wanted, rtol=1e-12, atol=1e-12)
        assert not torch.equal(mesa.teacher(X), t), step


def test_a_forward_begun_ahead_is_the_one_that_counts(backend):
    model = mlp()
    mesa, other, calls = MESA(model, start_epoch=1), MESA(model, start_epoch=0), []
    mesa.teacher.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model[0].weight.mul_(2)
    mesa.begin(X)
    assert not calls  # inactive
    mesa.set_epoch(2)
    mesa.begin(X)
    z = model(X)
    torch.testing.assert_close(mesa(z, Y, X), other(z, Y, X), rtol=0, atol=0)
    assert len(calls) == 1
    mesa(z, Y, X)
    mesa.begin(X)
    mesa(z[:5], Y[:5], X[:5])  # of other inputs
    assert len(calls) == 4
    mesa.update()  # what was begun is stale now
    other.update()
    torch.testing.assert_close(mesa(z, Y, X), other(z, Y, X), rtol=0, atol=0)
    assert len(calls) == 5


def test_the_average_never_sees_perturbed_weights(backend):
    model = mlp()
    mesa, opt = MESA(model), SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    with opt.ascent():
        F.cross_entropy(model(X), Y).backward()
    with opt.descent():
        with pytest.raises(RuntimeError, match=r"update\(\) cannot be called inside descent\(\)"):
            mesa.update()
        F.cross_entropy(model(X), Y).backward()
    opt.step()
    mesa.update()


def test_a_skipped_step_leaves_the_teacher(backend):
    """docs/algorithms.md#one-step: a skipped step leaves the method's state untouched."""
    model = mlp()
    opt = SAM(model.parameters(), SGD, rho=0.5, lr=0.3, model=model)
    mesa = MESA(model, decay=0.5)
    mesa.attach(opt)
    opt.step(lambda x, y: F.cross_entropy(model(x), y, reduction="none"), X, Y)
    before = snapshot(mesa.teacher)
    opt.step(lambda x, y: F.cross_entropy(model(x), y, reduction="none") * torch.nan, X, Y)
    assert int(opt.skipped_steps) == 1
    for name, t in mesa.teacher.state_dict().items():
        assert torch.equal(t, before[name])


@pytest.mark.parametrize("batchnorm", [False, True])
def test_an_update_is_one_launch_and_reads_nothing_on_the_host(backend, batchnorm, monkeypatch, launches):
    monkeypatch.setattr(reference_common, "READ_SCALARS", False)
    model = mlp(torch.float32, batchnorm=batchnorm)
    mesa = MESA(model, decay=0.5, start_epoch=0)
    with NoHostReads():
        mesa(model(X.float()), Y, X.float()).backward()
        launches.clear()
        mesa.update(torch.tensor(0.0))
    assert launches == ([] if backend == "torch" else ["_ema_kernel"])


def test_attach_may_be_undone(backend):
    model = mlp()
    mesa, opt = MESA(model), SGD(model.parameters(), lr=0.5)
    handle = mesa.attach(opt)
    handle.remove()
    before = snapshot(mesa.teacher)
    F.cross_entropy(model(X), Y).backward()
    opt.step()
    assert all(torch.equal(t, before[name]) for name, t in mesa.teacher.state_dict().items())


def test_resume_goes_on_bit_for_bit(backend, tmp_path):
    """docs/algorithms.md#invariant-29."""

    def go(model, mesa, opt, epochs):
        for epoch in epochs:
            mesa.set_epoch(epoch)
            for x, y in batches(3, seed=epoch):
                opt.zero_grad()
                mesa(model(x), y, x).backward()
                opt.step()
                mesa.update()

    def make(seed):
        model = mlp(batchnorm=True, seed=seed)
        return model, MESA(model, decay=0.9, start_epoch=1), SGD(model.parameters(), lr=0.3, momentum=0.9)

    parts = make(1)
    go(*parts, range(1, 4))
    torch.save([part.state_dict() for part in parts], tmp_path / "saved.pt")
    go(*parts, range(4, 6))
    others = make(7)
    for part, state in zip(others, torch.load(tmp_path / "saved.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert others[1].epoch == 3
    go(*others, range(4, 6))
    assert_same(others[0], snapshot(parts[0]))
    for name, t in others[1].teacher.state_dict().items():
        assert torch.equal(t, parts[1].teacher.state_dict()[name])


def test_compiled_models_and_teachers(backend):
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager")
    mesa, other = MESA(compiled, start_epoch=0, decay=0.9), MESA(model, start_epoch=0, decay=0.9)
    assert type(mesa.teacher) is nn.Sequential
    mesa.teacher.compile(backend="aot_eager")
    for _ in range(2):
        z = compiled(X).detach()
        torch.testing.assert_close(mesa(z, Y, X), other(z, Y, X))
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        mesa.update()
        other.update()
    assert mesa.state_dict().keys() == other.state_dict().keys()


def test_the_loss_may_be_inside_a_compiled_function(backend):
    model = mlp()
    mesa = MESA(model, start_epoch=0, decay=0.9)
    wanted = mesa(model(X), Y, X)
    compiled = torch.compile(lambda x, y: mesa(model(x), y, x), backend="aot_eager")
    torch.testing.assert_close(compiled(X, Y), wanted)


def test_shared_weights_are_averaged_once(backend):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model = Tied()
    mesa = MESA(model, decay=0.5)
    before = model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight.add_(1)
    mesa.update()
    assert mesa.teacher.b.weight is mesa.teacher.a.weight
    torch.testing.assert_close(mesa.teacher.a.weight, before + 0.5)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"decay": 0.0}, ValueError, r"decay must be finite and in \(0, 1\), got 0"),
        ({"decay": 1.0}, ValueError, "got 1"),
        ({"decay": "x"}, TypeError, "decay must be a number"),
        ({"tau": -1.0}, ValueError, "tau must be finite and > 0"),
        ({"lam": float("inf")}, ValueError, "lam"),
        ({"reduction": "max"}, ValueError, "reduction"),
    ],
)
def test_bad_settings_are_named(keywords, error, message):
    with pytest.raises(error, match=message):
        MESA(mlp(), **keywords)


def test_bad_inputs_are_named(backend):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        MESA(lambda x: x)
    model = mlp()
    mesa = MESA(model, start_epoch=0)
    with pytest.raises(ValueError, match=r"teacher's logits have shape \[5, 3\], the model's \[24, 3\]"):
        mesa(model(X), Y, X[:5])
    with pytest.raises(ValueError, match="targets must be"):
        mesa(model(X), Y.float(), X)


def test_channels_last_weights(backend):
    model = cnn().to(memory_format=torch.channels_last)
    mesa = MESA(model, decay=0.5)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.mul_(3)
    mesa.update()
    torch.testing.assert_close(mesa.teacher[0].weight, 2 * before)


def test_the_teacher_runs_once_in_a_step_whatever_its_inputs_are_nested_in():
    """A loss function gets the same tensors in every pass, in new containers."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

    model, calls = Named(), []
    mesa = MESA(model, start_epoch=0, reduction="none")
    mesa.teacher.register_forward_hook(lambda *_: calls.append(1))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    x, y = batches(1)[0]
    opt.step(lambda batch, y: mesa(model(**batch), y, batch), {"x": x}, y)
    assert len(calls) == 1
    opt.step(lambda batch, y: mesa(model(*batch), y, batch), (x,), y)
    assert len(calls) == 2
    opt.step(lambda batch, y: mesa(model(*batch), y, (batch[0].clone(),)), (x,), y)
    assert len(calls) == 4
