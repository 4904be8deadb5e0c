"""GSAM: the gap between the loss and the perturbed loss closes along the part of g that is orthogonal to g_adv."""

import math

import pytest
import torch
import torch.nn.functional as F
from methods import gsam_gradient
from oracle import perturbed_gradients
from problems import Quadratic, assert_same, batches, largest_difference, losses_of, mlp, snapshot

from fastsam import GSAM, SAM

SGD, RMSPROP = torch.optim.SGD, torch.optim.RMSprop


def test_worked_numbers(backend):
    q = Quadratic()
    opt = GSAM(q.parameters(), SGD, rho=0.1, lr=0.1)
    with opt.ascent():
        q().backward()
    with opt.descent():
        q().backward()
    torch.testing.assert_close(
        q.grad, torch.tensor([4.276363988730667, 6.203610274278843], dtype=torch.float64), rtol=1e-12, atol=0
    )
    d, g_adv = q.grad, torch.tensor([4.249615088301352, 6.221880078490091], dtype=torch.float64)
    assert torch.allclose(d @ g_adv, g_adv @ g_adv, rtol=1e-12)


def test_alpha_zero_is_sam_bit_for_bit(backend):
    models = [mlp(torch.float32), mlp(torch.float32)]
    opts = [SAM(models[0].parameters(), SGD, lr=0.1), GSAM(models[1].parameters(), SGD, alpha=0.0, lr=0.1)]
    for x, y in batches(4, dtype=torch.float32):
        for opt, model in zip(opts, models, strict=True):
            opt.step(losses_of(model), x, y)
    assert_same(models[1], snapshot(models[0]))


def test_the_radius_follows_the_learning_rate_between_its_ends():
    model = mlp()
    opt = GSAM(model.parameters(), SGD, rho=0.2, rho_min=0.1, lr_max=1.0, lr_min=0.5, lr=1.0)
    group = opt.param_groups[0]
    for lr, rho in ((1.0, 0.2), (0.5, 0.1), (0.75, 0.15), (2.0, 0.2), (0.1, 0.1)):
        group["lr"] = lr
        assert math.isclose(opt.radius(group), rho, rel_tol=1e-12)
    level = GSAM(model.parameters(), SGD, rho=0.2, rho_min=0.1, lr_max=0.5, lr_min=0.5, lr=0.5)
    assert level.radius(level.param_groups[0]) == 0.2


def test_several_pairs_before_one_step_are_combined_one_by_one(backend):
    """Each pair's own combination is added to p.grad, as its share of the loss says."""
    expected, model = mlp(), mlp()
    opt = GSAM(model.parameters(), SGD, rho=0.1, model=model, lr=0.1)
    (x1, y1), (x2, y2) = batches(2)
    params, total = list(expected.parameters()), None
    for x, y, share in ((x1, y1, 0.25), (x2, y2, 0.75)):
        g, g_adv = perturbed_gradients(params, lambda: F.cross_entropy(expected(x), y) * share, 0.1)  # noqa: B023
        d = gsam_gradient(g, g_adv)
        total = d if total is None else [t + di for t, di in zip(total, d, strict=True)]
        with opt.ascent():
            (losses_of(model)(x, y).mean() * share).backward()
        with opt.descent():
            (losses_of(model)(x, y).mean() * share).backward()
    for p, t in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, t, rtol=1e-11, atol=1e-14)
    opt.step()


def test_a_tensor_with_one_gradient_alone_takes_part_with_zeros(backend):
    a, b = (torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2))
    opt = GSAM([a, b], SGD, rho=0.1, lr=1.0)
    with opt.ascent():
        (a * torch.tensor([3.0, 4.0])).sum().backward()
    with opt.descent():
        (a * torch.tensor([3.0, 4.0]) + b).sum().backward()
    g, g_adv = torch.tensor([3.0, 4, 0, 0]), torch.tensor([3.0, 4, 1, 1])
    expected = g_adv - 0.4 * (g - (g @ g_adv) / (g_adv @ g_adv) * g_adv)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), expected.double(), rtol=1e-7, atol=0)


def test_a_gradient_that_is_not_finite_is_left_to_the_check(backend):
    model = mlp()
    opt, before = GSAM(model.parameters(), SGD, lr=0.1, momentum=0.9), snapshot(model)
    x, y = batches(1)[0]
    opt.step(lambda x, y: losses_of(model)(x, y) * torch.inf, x, y)
    assert_same(model, before)
    assert opt.skipped_steps == 1
    opt.step(losses_of(model), x, y)
    assert largest_difference(model, mlp()) > 1e-4


@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (ValueError, r"alpha must be in \[0, 1\], got 1.5", {"alpha": 1.5}),
        (ValueError, "alpha must be finite and >= 0, got -1", {"alpha": -1}),
        (TypeError, "alpha must be a number", {"alpha": "big"}),
        (ValueError, "rho_min and lr_max go together, got rho_min=0.01 and lr_max=None", {"rho_min": 0.01}),
        (ValueError, "rho_min and lr_max go together", {"lr_max": 1.0}),
        (ValueError, "lr_min must be at most lr_max, got 2.0 and 1.0", {"rho_min": 0, "lr_max": 1.0, "lr_min": 2.0}),
        (TypeError, "lr_max must be a number", {"rho_min": 0.01, "lr_max": "1"}),
    ],
)
def test_bad_arguments_are_refused(error, message, keywords):
    with pytest.raises(error, match=message):
        GSAM(mlp().parameters(), SGD, lr=0.1, **keywords)


def test_the_bases_own_alpha_is_set_by_wrap():
    base = RMSPROP(mlp().parameters(), lr=0.01, alpha=0.9)
    opt = GSAM.wrap(base, alpha=0.2)
    assert (opt.param_groups[0]["alpha"], opt.param_groups[0]["sam_alpha"]) == (0.9, 0.2)
