"""SAM and ASAM: worked numbers, invariants, groups, accumulation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import ALL_BASES, by_two_steps
from oracle import Davda54SAM
from problems import Quadratic, batches, largest_difference, losses_of, mlp, snapshot
from torch import nn

from fastsam import SAM


@pytest.mark.parametrize("base", ["sgd", "damped", "adamw", "adadelta"])
def test_rho_zero_is_the_base_optimizer(backend, base):
    cls, kwargs = ALL_BASES[base]
    plain, model = mlp(batchnorm=True), mlp(batchnorm=True)
    base_opt, opt = cls(plain.parameters(), **kwargs), SAM(model.parameters(), cls, rho=0.0, model=model, **kwargs)
    for x, y in batches():
        base_opt.zero_grad()
        losses_of(plain)(x, y).mean().backward()
        base_opt.step()
        opt.step(losses_of(model), x, y)
    assert largest_difference(model, plain) < 1e-12


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_davda54_two_step_loop_needs_only_another_import(backend, cls, adaptive):
    models = []
    for implementation in (Davda54SAM, SAM):
        model = mlp(torch.float32)
        opt = implementation(model.parameters(), cls, rho=0.5, adaptive=adaptive, lr=0.02)
        for x, y in batches(dtype=torch.float32):
            by_two_steps(opt, losses_of(model), x, y)
        models.append(model)
    assert largest_difference(*models) < 1e-6


@pytest.mark.parametrize(
    ("adaptive", "weight_decay", "gradient"),
    [
        (False, 0.0, (4.249615088301352, 6.221880078490091)),
        (True, 0.0, (4.284604989415154, 6.41109609582189)),
        (False, 0.01, (4.259615088301352, 6.241880078490091)),
    ],
)
def test_worked_numbers(backend, adaptive, weight_decay, gradient):
    q = Quadratic()
    opt = SAM(q.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1, weight_decay=weight_decay)
    with opt.ascent():
        q().backward()
    with opt.descent():
        eps = q.w - torch.tensor([1.0, 2.0], dtype=torch.float64)
        q().backward()
    opt.step()
    moved = (torch.tensor([1.0, 2.0], dtype=torch.float64) - q.w) / 0.1
    torch.testing.assert_close(moved, torch.tensor(gradient, dtype=torch.float64), rtol=1e-11, atol=0)
    expected = (0.03162277660168379, 0.18973665961010278) if adaptive else (0.05547001962252292, 0.08320502943378438)
    torch.testing.assert_close(eps, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)
    if not adaptive:
        torch.testing.assert_close(opt.last_grad_norm.item(), 7.211102550927978, rtol=1e-15, atol=0)


def test_official_asam_takes_names_from_the_model_or_the_parameters(backend):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
            self.bias = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

        def forward(self):
            return 4 * self.weight[0] + 6 * self.weight[1] + 5 * self.bias[0]

    for by_name in (False, True):
        m = Named()
        params = m.named_parameters() if by_name else m.parameters()
        opt = SAM(params, torch.optim.SGD, 0.1, "official", model=None if by_name else m, lr=1.0)
        with opt.ascent():
            m().backward()
        with opt.descent():
            eps = [m.weight.detach() - torch.tensor([1.0, 2.0]), m.bias.detach() - 3.0]
        norm = math.sqrt((1.01 * 4) ** 2 + (2.01 * 6) ** 2 + 25)
        assert eps[0].tolist() == pytest.approx([0.1 * 1.01**2 * 4 / norm, 0.1 * 2.01**2 * 6 / norm], rel=1e-12)
        assert eps[1].item() == pytest.approx(0.1 * 5 / norm, rel=1e-12)


def test_perturbation_of_a_quadratic_is_first_order_sharpness(backend):
    q, start, errors = Quadratic(), 8.5, []
    for rho in (0.1, 0.05, 0.025):
        opt = SAM(q.parameters(), torch.optim.SGD, rho=rho, lr=0.0)
        with opt.ascent():
            q().backward()
        with opt.descent(), torch.no_grad():
            errors.append(q().item() - start - rho * 7.211102550927978)
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-6)
    assert errors[1] / errors[2] == pytest.approx(4, rel=1e-6)


def test_asam_does_not_see_a_rescaling_that_keeps_the_function(backend):
    def perturbations(c, adaptive):
        torch.manual_seed(3)
        m = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()
        with torch.no_grad():
            m[0].weight.mul_(c)
            m[2].weight.div_(c)
        before = [p.detach().clone() for p in m.parameters()]
        opt = SAM(m.parameters(), torch.optim.SGD, rho=0.1, adaptive=adaptive, lr=0.1)
        x, y = batches()[0]
        with opt.ascent():
            losses_of(m)(x, y).mean().backward()
        with opt.descent():
            eps = [(p.detach() - b) for p, b in zip(m.parameters(), before, strict=True)]
        return eps[0] / c, eps[1] * c

    for adaptive in (True, False):
        pairs = zip(perturbations(1, adaptive), perturbations(4, adaptive), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in pairs) is adaptive


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-20, 20), sign=st.sampled_from([-1, 1]), n=st.integers(1, 300))
def test_perturbation_has_length_rho_for_gradients_of_every_size(exponent, sign, n):
    g = torch.linspace(1, 2, n) * sign * 10.0**exponent
    w = nn.Parameter(torch.ones(n))
    opt = SAM([w], torch.optim.SGD, rho=0.05, lr=0.1)
    with opt.ascent():
        (w * g).sum().backward()
    with opt.descent():
        # 1 + eps would round eps away, so ask the sum at zero
        norm = opt.last_grad_norm.item()
        assert norm == pytest.approx(g.double().norm().item(), rel=1e-6)
        expected = (1 + 0.05 * g.double() / (g.double().norm() + 1e-12)).float()
        torch.testing.assert_close(w.detach(), expected, rtol=1.2e-7, atol=0)


def test_zero_gradient_means_no_perturbation(backend):
    w = nn.Parameter(torch.ones(5))
    opt = SAM([w], torch.optim.SGD, rho=0.05, lr=0.1)
    with opt.ascent():
        (w * 0).sum().backward()
    with opt.descent():
        assert torch.equal(w, torch.ones(5))


def test_maximize_perturbs_downhill(backend):
    ends = []
    for maximize in (False, True):
        q = Quadratic()
        opt = SAM(q.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, maximize=maximize)
        sign = -1 if maximize else 1
        for _ in range(3):
            with opt.ascent():
                (sign * q()).backward()
            with opt.descent():
                (sign * q()).backward()
            opt.step()
        ends.append(q.w)
    torch.testing.assert_close(*ends, rtol=1e-14, atol=0)


def test_groups_have_their_own_rho_and_may_stay_out(backend):
    weights = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
    groups = [
        {"params": [weights[0]], "rho": 0.1},
        {"params": [weights[1]]},
        {"params": [weights[2]], "perturb": False},
    ]
    opt = SAM([*groups, {"params": []}], torch.optim.SGD, rho=0.2, lr=0.1)
    with opt.ascent():
        (3 * weights[0] + 4 * weights[1] + 100 * weights[2]).sum().backward()
    with opt.descent():
        assert [w.item() for w in weights] == pytest.approx([0.1 * 3 / 5, 0.2 * 4 / 5, 0], rel=1e-11)
        weights[2].sum().backward()
    opt.step()
    assert [w.item() for w in weights] == [0, 0, -0.1]


def test_weight_decay_acts_on_the_restored_weights(backend):
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    opt = SAM([w], torch.optim.AdamW, rho=0.5, lr=0.1, weight_decay=0.5)

    def losses(x):
        return (w * 0).expand(1)

    opt.step(losses, torch.zeros(1))
    assert w.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5), rel=1e-7)


def test_exact_accumulation_is_one_large_batch(backend):
    whole, parts = mlp(), mlp()
    opt_whole = SAM(whole.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    opt_parts = SAM(parts.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    for x, y in batches():
        opt_whole.step(losses_of(whole), x, y)
        with opt_parts.ascent():
            for rows in (slice(0, 5), slice(5, 12)):
                (losses_of(parts)(x[rows], y[rows]).sum() / 12).backward()
        with opt_parts.descent():
            for rows in (slice(0, 5), slice(5, 12)):
                (losses_of(parts)(x[rows], y[rows]).sum() / 12).backward()
        opt_parts.step()
    assert largest_difference(whole, parts) < 1e-12


def test_several_pairs_before_a_step_average_their_shards_gradients(backend):
    model = mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    x, y = batches()[0]
    shards = [(x[:4], y[:4]), (x[4:], y[4:])]
    start, expected = snapshot(model), [torch.zeros_like(p) for p in model.parameters()]
    for xs, ys in shards:
        params = list(model.parameters())
        g = torch.autograd.grad(losses_of(model)(xs, ys).mean(), params)
        norm = torch.sqrt(sum((gi**2).sum() for gi in g))
        with torch.no_grad():
            for p, gi in zip(params, g, strict=True):
                p.add_(0.1 * gi / norm)
        for total, v in zip(expected, torch.autograd.grad(losses_of(model)(xs, ys).mean(), params), strict=True):
            total += v * len(xs) / 12
        model.load_state_dict(start)
    for xs, ys in shards:
        with opt.ascent():
            losses_of(model)(xs, ys).mean().backward()
        with opt.descent():
            (losses_of(model)(xs, ys).mean() * len(xs) / 12).backward()
    opt.step()
    for p, w, total in zip(model.parameters(), start.values(), expected, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * total, rtol=1e-10, atol=1e-12)
