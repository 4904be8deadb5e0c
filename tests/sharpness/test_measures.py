"""Sharpness and the gradients' cosine: closed forms, SAM's own perturbation, and plain loops."""

import pytest
import torch
import torch.nn.functional as F
from problems import batches, losses_of, mlp
from torch import nn

from fastsam import SAM
from fastsam.sharpness import gradient_cosine, m_sharpness, sam_sharpness

EXACT = {"rel": 1e-12, "abs": 1e-14}


class Quadratic(nn.Module):
    """L(w) = w'Aw/2, once for each row."""

    def __init__(self):
        super().__init__()
        self.a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, x):
        return (self.w @ self.a @ self.w / 2).expand(len(x)) * x


def plain_sharpness(model, parts, rho, adaptive=False):
    """The definition, in plain torch: mean over parts of L(w + eps) - L(w), weighted by their rows."""
    params = list(model.parameters())
    total, rows = 0.0, 0
    for x, y in parts:
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, params)
        scales = [p.detach().abs() if adaptive else torch.ones_like(p) for p in params]
        norm = torch.sqrt(sum((g * t).square().sum() for g, t in zip(grads, scales, strict=True)))
        moved = {
            n: p + rho * t**2 * g / (norm + 1e-12)
            for (n, p), t, g in zip(model.named_parameters(), scales, grads, strict=True)
        }
        after = F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)
        total += (after - loss).item() * len(x)
        rows += len(x)
    return total / rows


def test_a_quadratic_has_its_closed_form():
    """L(w + eps) - L(w) = rho |g| + eps'A eps / 2."""
    model, rho = Quadratic(), 0.1
    g = model.a @ model.w.detach()
    eps = rho * g / g.norm()
    found = sam_sharpness(model, model, [(torch.ones(4, dtype=torch.float64),)], rho)
    assert found.value == pytest.approx(float(rho * g.norm() + eps @ model.a @ eps / 2), **EXACT)
    assert found.loss == pytest.approx(float((model.w @ model.a @ model.w / 2).detach()), **EXACT)
    assert (found.samples, found.subsets, float(found)) == (4, 1, found.value)
    cosine = gradient_cosine(model, model, [(torch.ones(4, dtype=torch.float64),)], rho)
    assert cosine.mean == pytest.approx(
        float(F.cosine_similarity(g, model.a @ (model.w.detach() + eps), dim=0)), **EXACT
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_batches_of_several_sizes_are_the_plain_loop(adaptive):
    model = mlp()
    parts = [*batches(2), *batches(1, rows=5, seed=3)]
    found = sam_sharpness(model, losses_of(model), parts, 0.3, adaptive=adaptive)
    assert found.value == pytest.approx(plain_sharpness(model, parts, 0.3, adaptive), **EXACT)
    assert (found.samples, found.subsets) == (29, 3)


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_shards_are_batches_of_their_size(size):
    model, parts = mlp(), batches(2)
    shards = [(xs, ys) for x, y in parts for xs, ys in zip(x.split(size), y.split(size), strict=True)]
    found = m_sharpness(model, losses_of(model), parts, 0.3, shard_size=size)
    assert found.value == pytest.approx(plain_sharpness(model, shards, 0.3), **EXACT)
    assert found.subsets == len(shards)


def test_the_whole_loader_is_one_large_batch():
    model, parts = mlp(), batches(3)
    together = [tuple(torch.cat(part) for part in zip(*parts, strict=True))]
    found = sam_sharpness(model, losses_of(model), parts, 0.3, whole_loader=True)
    assert found.value == pytest.approx(plain_sharpness(model, together, 0.3), **EXACT)
    assert (found.samples, found.subsets) == (36, 1)
    steps = {"ascent_steps": 3}
    several = sam_sharpness(model, losses_of(model), parts, 0.3, whole_loader=True, **steps)
    assert several.value == pytest.approx(sam_sharpness(model, losses_of(model), together, 0.3, **steps).value, **EXACT)


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_the_difference_that_a_step_of_sam_meets(adaptive):
    """Both losses of SAM's two passes, in training mode with batch norm."""
    model, batch = mlp(batchnorm=True), batches(1)[0]
    seen = []

    def losses(x, y):
        seen.append(F.cross_entropy(model(x), y, reduction="none"))
        return seen[-1]

    found = sam_sharpness(model, losses_of(model), [batch], 0.3, adaptive=adaptive, mode="train")
    SAM(model.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, model=model, lr=0.1).step(losses, *batch)
    assert [found.loss, found.perturbed_loss] == [pytest.approx(loss.mean().item(), **EXACT) for loss in seen]


@pytest.mark.parametrize("adaptive", [False, True])
def test_several_steps_climb_within_the_ball(adaptive):
    """Appendix C.6 in plain torch, one step after the other, each projected."""
    model, (x, y), rho, steps = mlp(), batches(1)[0], 0.5, 4
    params = dict(model.named_parameters())
    scale = {n: p.detach().abs() if adaptive else torch.ones_like(p) for n, p in params.items()}

    def at(eps):
        moved = {n: (p + eps[n]).detach().requires_grad_() for n, p in params.items()}
        loss = F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)
        return loss, dict(zip(moved, torch.autograd.grad(loss, moved.values()), strict=True))

    def norm(tensors):
        return torch.sqrt(sum(t.square().sum() for t in tensors))

    eps = {n: torch.zeros_like(p) for n, p in params.items()}
    before, _ = at(eps)
    for _ in range(steps):
        _, g = at(eps)
        length = norm(g[n] * scale[n] for n in g)
        eps = {n: eps[n] + rho * scale[n] ** 2 * g[n] / (length + 1e-12) for n in g}
        eps = {n: e * min(1.0, float(rho / norm(eps[m] / scale[m] for m in eps))) for n, e in eps.items()}
    found = sam_sharpness(model, losses_of(model), [(x, y)], rho, adaptive=adaptive, ascent_steps=steps)
    assert found.value == pytest.approx((at(eps)[0] - before).item(), rel=1e-10)
    assert found.value > sam_sharpness(model, losses_of(model), [(x, y)], rho, adaptive=adaptive).value


def test_weights_of_16_bits_move_by_less_than_their_spacing():
    """Rounding to nearest would drop a perturbation of this size, and find no sharpness at all."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    found = sam_sharpness(model, lambda x: (x @ model.weight.float().T).mean(1), [(torch.ones(8, 64),)], 1e-2)
    # dL/dw = 1/64 each, |g| = 1: the loss rises by rho, in expectation over the rounding
    assert found.value == pytest.approx(1e-2, rel=0.5)


def test_zero_radius_and_zero_gradient_have_no_sharpness():
    model = mlp()
    assert sam_sharpness(model, losses_of(model), batches(2), 0.0).value == 0
    model = Quadratic()
    nn.init.zeros_(model.w)
    for steps in (1, 3):
        assert sam_sharpness(model, model, [(torch.ones(4, dtype=torch.float64),)], 0.1, ascent_steps=steps).value == 0
