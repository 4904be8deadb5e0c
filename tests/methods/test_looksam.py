"""LookSAM: SAM in every k-th step, and its correction added to the plain gradient in the others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from laws import Cell, Subject
from methods import looksam_vector
from oracle import perturbed_gradients
from problems import Quadratic, assert_same, batches, largest_difference, losses_of, mlp, snapshot
from training import Training

from fastsam import SAM, LookSAM

SGD, RMSPROP = torch.optim.SGD, torch.optim.RMSprop


def with_the_passes_it_needs(opt, losses, *batch):
    """Contexts, the second one only where it is needed."""
    needed = opt.needs_second_pass
    with opt.ascent():
        losses(*batch).mean().backward()
    if needed:
        with opt.descent():
            losses(*batch).mean().backward()
    opt.step()
    opt.zero_grad()


def with_plain_steps_between(opt, losses, *batch):
    """Two calls where a second pass is needed, and else a plain backward and step()."""
    losses(*batch).mean().backward()
    if opt.needs_second_pass:
        opt.first_step(zero_grad=True)
        losses(*batch).mean().backward()
        opt.second_step(zero_grad=True)
    else:
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("way", [with_the_passes_it_needs, with_plain_steps_between])
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_loops_that_ask_which_passes_are_needed_train_alike(backend, base, way):
    cell = Cell(Subject("looksam"), base, "loss_fn")
    expected, asking = Training(cell), Training(cell)
    for step in range(7):
        asking.begin()
        assert asking.opt.needs_second_pass == (step % 3 == 0)
        way(asking.opt, asking.losses, *asking.batch)
        asking.taken += 1
        expected.step()
    assert_same(asking.model, snapshot(expected.model))


@pytest.mark.parametrize("after", [1, 2, 4])
def test_resumes_around_a_base_that_keeps_no_state(backend, after):
    model = mlp()
    opt = LookSAM(model.parameters(), SGD, k=3, lr=0.01)
    data = batches(8)
    for x, y in data[:after]:
        opt.step(losses_of(model), x, y)
    resumed = mlp()
    resumed.load_state_dict(model.state_dict())
    again = LookSAM(resumed.parameters(), SGD, k=3, lr=0.01)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for x, y in data[after:]:
        opt.step(losses_of(model), x, y)
        again.step(losses_of(resumed), x, y)
    assert_same(resumed, snapshot(model))


def test_passes_are_counted(backend):
    model, calls = mlp(), []

    def losses(x, y):
        calls.append(len(x))
        return losses_of(model)(x, y)

    opt = LookSAM(model.parameters(), SGD, k=5, lr=0.1)
    for x, y in batches(10):
        opt.step(losses, x, y)
    assert len(calls) == 10 + 2


def test_worked_numbers(backend):
    q = Quadratic()
    opt = LookSAM(q.parameters(), SGD, rho=0.1, lr=0.1)
    with opt.ascent():
        q().backward()
    with opt.descent():
        q().backward()
    opt.step()
    kept = torch.cat([opt.state[p]["fastsam_g_v"] for p in (q.u, q.v)])
    vector = torch.tensor([0.07040425567473996, -0.04693617044982723], dtype=torch.float64)
    torch.testing.assert_close(kept, vector, rtol=1e-11, atol=0)
    opt.zero_grad()
    with opt.ascent():
        q().backward()
    g = torch.tensor([2.102927465660585, 4.330662475471846], dtype=torch.float64)
    torch.testing.assert_close((q.grad - g).norm(), 0.7 * g.norm(), rtol=1e-6, atol=0)
    opt.step()
    torch.testing.assert_close(q.w, torch.tensor([0.08434728, 1.13167805], dtype=torch.float64), rtol=0, atol=5e-9)


def test_k_one_is_sam_bit_for_bit(backend):
    models = [mlp(torch.float32), mlp(torch.float32)]
    opts = [SAM(models[0].parameters(), SGD, rho=0.1, lr=0.1), LookSAM(models[1].parameters(), SGD, k=1, lr=0.1)]
    for x, y in batches(4, dtype=torch.float32):
        for opt, model in zip(opts, models, strict=True):
            opt.step(losses_of(model), x, y)
    assert_same(models[1], snapshot(models[0]))


def test_a_first_step_that_is_skipped_leaves_no_correction(backend):
    """RMSprop makes its state where there is none, so ours must not be there before it."""
    model = mlp()
    opt, before = LookSAM(model.parameters(), RMSPROP, k=2, lr=0.01), snapshot(model)
    x, y = batches(1)[0]
    opt.step(lambda x, y: losses_of(model)(x, y) * torch.inf, x, y)
    assert_same(model, before)
    assert not opt.state
    opt.step(losses_of(model), x, y)
    plain = mlp()
    base = RMSPROP(plain.parameters(), lr=0.01)
    losses_of(plain)(x, y).mean().backward()
    base.step()
    assert_same(model, snapshot(plain))


def test_a_skipped_step_keeps_the_correction(backend):
    model = mlp()
    opt = LookSAM(model.parameters(), SGD, k=1, lr=0.1, momentum=0.9)
    x, y = batches(1)[0]
    opt.step(losses_of(model), x, y)
    kept = [opt.state[p]["fastsam_g_v"].clone() for p in model.parameters()]
    opt.step(lambda x, y: losses_of(model)(x, y) * torch.nan, x, y)
    assert all(torch.equal(opt.state[p]["fastsam_g_v"], k) for p, k in zip(model.parameters(), kept, strict=True))
    assert opt.skipped_steps == 1


def test_what_a_failed_pass_found_is_forgotten(backend):
    model = mlp()
    opt = LookSAM(model.parameters(), SGD, lr=0.0)
    (x1, y1), (x2, y2) = batches(2)
    with opt.ascent():
        losses_of(model)(x1, y1).mean().backward()
    with opt.descent():
        losses_of(model)(x1, y1).mean().backward()
    opt.zero_grad()
    opt.step(losses_of(model), x2, y2)
    g, g_adv = perturbed_gradients(list(model.parameters()), lambda: F.cross_entropy(model(x2), y2), 0.1)
    for p, v in zip(model.parameters(), looksam_vector(g, g_adv), strict=True):
        torch.testing.assert_close(opt.state[p]["fastsam_g_v"], v, rtol=1e-10, atol=1e-15)


def test_the_loss_scale_is_no_part_of_the_correction(backend):
    (x, y), model = batches(1, dtype=torch.float32)[0], mlp(torch.float32)
    vectors = []
    for scale in (1.0, 1024.0):
        opt = LookSAM(model.parameters(), SGD, lr=0.0)
        opt.step(losses_of(model), x, y, scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        vectors.append(torch.cat([opt.state[p]["fastsam_g_v"].flatten() for p in model.parameters()]))
    torch.testing.assert_close(*vectors, rtol=1e-6, atol=0)


def test_contexts_under_a_scaler_need_its_scale(backend):
    model, scaler = mlp(torch.float32), torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = batches(1, dtype=torch.float32)[0]
    opt, before = LookSAM(model.parameters(), SGD, lr=0.1), snapshot(model)

    def passes(**keywords):
        opt.zero_grad()
        with opt.ascent(**keywords):
            scaler.scale(losses_of(model)(x, y).mean()).backward()
        with opt.descent():
            scaler.scale(losses_of(model)(x, y).mean()).backward()

    passes()
    with pytest.raises(RuntimeError, match=r"must not hold the loss scale: pass it as opt.ascent\(grad_scale="):
        scaler.step(opt)
    assert_same(model, before)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    passes(grad_scale=64.0)
    scaler.step(opt)
    assert largest_difference(model, mlp(torch.float32)) > 1e-4


@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (ValueError, "k must be at least 1, got 0", {"k": 0}),
        (TypeError, "k must be an integer, got 2.5", {"k": 2.5}),
        (ValueError, "alpha must be finite and >= 0, got -0.1", {"alpha": -0.1}),
        (ValueError, "scope must be one of 'global', 'tensor', got 'layer'", {"scope": "layer"}),
    ],
)
def test_bad_arguments_are_refused(error, message, keywords):
    with pytest.raises(error, match=message):
        LookSAM(mlp().parameters(), SGD, lr=0.1, **keywords)
