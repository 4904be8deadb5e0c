"""Tensors of every kind in one optimizer: dtypes, layouts, shapes, complex and sparse ones, and 16 bits' rounding."""

import pytest
import torch
from faults import PlantedError
from methods import by_loss_function
from problems import batches, losses_of, mlp, snapshot
from torch import nn

from fastsam import SAM


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_exception_in_the_second_pass_restores_every_dtype(backend, dtype):
    model = mlp(dtype, batchnorm=True, dropout=0.3)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, model=model, lr=0.1)
    (x, y), calls, before = batches(1, dtype=dtype)[0], [], weights_of(model)

    def losses(x, y):
        calls.append(1)
        if len(calls) == 2:
            assert not torch.equal(model[0].weight, before[0])
            raise PlantedError
        return losses_of(model)(x, y)

    with pytest.raises(PlantedError):
        opt.step(losses, x, y)
    assert all(map(torch.equal, weights_of(model), before))


def test_gradients_in_one_pass_only_frozen_and_tied_parameters(backend):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.both, self.frozen = (nn.Linear(4, 4).double() for _ in range(4))
            self.tied = nn.Linear(4, 4).double()
            self.tied.weight = self.both.weight
            self.frozen.requires_grad_(False)
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            x = self.tied(torch.tanh(self.both(x))) + self.frozen(x)
            return self.first(x) if self.passes % 2 else self.second(x)

    torch.manual_seed(0)
    model = Odd()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = snapshot(model)
    opt.step(lambda x: model(x).square().mean(1), torch.randn(5, 4, dtype=torch.float64))
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"second.weight", "second.bias", "both.weight", "both.bias", "tied.weight", "tied.bias"}
    # the tied weight counts once in the norm
    params = list(dict.fromkeys(p for p in model.parameters() if p.requires_grad))
    assert sum(p is model.both.weight for p in params) == 1


def test_mixed_dtypes_layouts_and_odd_shapes_in_one_optimizer(backend):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(5, 7, dtype=torch.float64).t()),
        nn.Parameter(torch.randn(70, dtype=torch.bfloat16)),
        nn.Parameter(torch.randn(33, dtype=torch.float16)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(0)),
        nn.Parameter(torch.randn(12)[1:]),
        nn.Parameter(torch.randn(4, 6)[:, ::2]),
    ]
    before = [p.detach().clone() for p in params]
    opt = SAM(params, torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)

    def losses(x):
        return sum((p.double() ** 2).sum() for p in params).expand(1)

    norm = torch.sqrt(sum(((2 * p.detach().double()) ** 2).sum() for p in params)).item()
    with opt.ascent():
        losses(None).mean().backward()
    with opt.descent():
        for p, b in zip(params, before, strict=True):
            expected = b.double() * (1 + 0.5 * 2 / norm)
            spacing = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(p.dtype, 2**-22)
            assert ((p.double() - expected).abs() <= expected.abs() * spacing + 1e-30).all(), p.dtype
        losses(None).mean().backward()
    assert all(map(torch.equal, (p.detach() for p in params), before))
    opt.step()
    for p, b in zip(params, before, strict=True):
        expected = b.double() - 0.1 * 2 * b.double() * (1 + 1 / norm)
        spacing = {torch.bfloat16: 2**-6, torch.float16: 2**-9}.get(p.dtype, 2**-20)
        assert ((p.double() - expected).abs() <= b.double().abs() * spacing + 1e-30).all(), p.dtype


def test_complex_parameters_count_as_pairs_of_reals(backend):
    z = nn.Parameter(torch.tensor([3 + 4j, 0j], dtype=torch.complex128))
    r = nn.Parameter(torch.view_as_real(z.detach()).clone())
    ends = []
    for p in (z, r):
        opt = SAM([p], torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
        target = torch.ones_like(p)

        def losses(x, p=p, target=target):
            d = p - target if not p.is_complex() else torch.view_as_real(p) - 1
            return (d**4).sum().expand(1)

        for _ in range(3):
            opt.step(losses, torch.zeros(1))
        ends.append(torch.view_as_real(p.detach()) if p.is_complex() else p.detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_sparse_gradients_are_coalesced(backend):
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(10, 4, sparse=sparse).double()
        opt = SAM(table.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
        ids = torch.tensor([1, 1, 3, 7, 1])
        for _ in range(3):
            opt.step(lambda i, table=table: table(i).square().sum(1), ids)
        ends.append(table.weight.detach())
        assert opt.last_grad_norm > 0
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "rho"), [(torch.bfloat16, 7e-3), (torch.float16, 9e-4)])
def test_stochastic_rounding_keeps_the_perturbation_of_16_bit_weights(backend, dtype, rho):
    def projection(stochastic):
        torch.manual_seed(0)
        w = nn.Parameter((torch.randn(200_000) * 0.01).to(dtype))
        g = torch.randn(200_000).to(dtype)
        before = w.detach().clone()
        opt = SAM([w], torch.optim.SGD, rho=rho, lr=0.1, stochastic_rounding=stochastic)
        with opt.ascent():
            (w * g).sum().backward()
        with opt.descent():
            eps = w.detach().double() - before.double()
        assert torch.equal(w, before)
        direction = g.double() / g.double().norm()
        return (eps @ direction).item() / rho

    assert projection("auto") == pytest.approx(1.0, abs=0.02)
    assert projection(False) < 0.9


def test_a_later_step_rounds_with_other_draws_and_a_seed_repeats_them(backend):
    def perturbed(seed, steps):
        w = nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
        opt = SAM([w], torch.optim.SGD, rho=0.1, lr=0.0, seed=seed)
        for _ in range(steps):
            with opt.ascent():
                w.float().sum().backward()
            with opt.descent():
                moved = w.detach().clone()
        return moved

    assert torch.equal(perturbed(3, 2), perturbed(3, 2))
    assert not torch.equal(perturbed(3, 1), perturbed(3, 2))
    assert not torch.equal(perturbed(3, 1), perturbed(4, 1))


def test_step_with_nothing_to_do(backend):
    w = nn.Parameter(torch.ones(3))
    opt = SAM([{"params": [w]}, {"params": []}], torch.optim.AdamW, rho=0.5, lr=0.1)
    assert opt.step(lambda: None) is None
    assert torch.equal(w, torch.ones(3))
    by_loss_function(opt, lambda x, y: w.sum() * x, torch.ones(2), torch.ones(2))
    assert not torch.equal(w, torch.ones(3))
