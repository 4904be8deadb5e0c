"""ESAM under DistributedDataParallel."""

import math

import pytest
import torch
import torch.distributed as dist
from ddp_steps import EXACT, SGD, assert_equal_on_ranks, rows_of_rank, wrap
from problems import batches, largest_difference, losses_of, mlp

from fastsam import ESAM


def esam_step(model, base, opt, parts, gamma, sharing, norm, losses_of=losses_of):
    """ESAM's step of docs/algorithms.md over ranks, in plain torch.

    `parts` are the ranks' batches; the mask is the optimizer's.
    """
    params, kept = list(model.parameters()), opt._kept()
    w = [p.detach().clone() for p in params]
    losses = losses_of(model)
    total = [torch.zeros_like(p) for p in params]
    for first in range(0, len(parts), sharing):
        group = parts[first : first + sharing]
        grads = [torch.autograd.grad(losses(*part).mean(), params) for part in group]
        g = [sum(of_param) / len(group) for of_param in zip(*grads, strict=True)]
        before = [losses(*part).detach() for part in group]
        squares = [(gi**2).sum() * (k or norm == "full") for gi, k in zip(g, kept, strict=True)]
        length = torch.stack(squares).sum().sqrt()
        with torch.no_grad():
            for p, gi, k in zip(params, g, kept, strict=True):
                p.add_(0.1 / 0.4 * k * gi / (length + 1e-12))
        for (x, y), old in zip(group, before, strict=True):
            rows = torch.topk(losses(x, y).detach() - old, max(1, math.floor(gamma * len(x) + 1e-6))).indices
            rows = rows if any(kept) else torch.arange(len(x))
            for t, d in zip(total, torch.autograd.grad(losses(x[rows], y[rows]).mean(), params), strict=True):
                t += d / len(parts)
        with torch.no_grad():
            for p, wi in zip(params, w, strict=True):
                p.copy_(wi)
    for p, d in zip(params, total, strict=True):
        p.grad = d
    base.step()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
@pytest.mark.parametrize("norm", ["masked", "full"])
def test_esam(sync, norm):
    for gamma, unused, bucket_view in ((0.5, False, False), (1.0, False, True), (0.5, True, True)):
        model, expected = mlp(), mlp()
        base = torch.optim.SGD(expected.parameters(), **SGD)
        ddp = wrap(model, find_unused_parameters=unused, gradient_as_bucket_view=bucket_view)
        keywords = {"beta": 0.4, "gamma": gamma, "norm": norm, "perturb_sync": sync}
        opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, **keywords, **SGD)
        empty = 0
        for x, y in batches(12, rows=16):
            empty += not any(opt._kept())
            parts = list(zip(x.chunk(2), y.chunk(2), strict=True))
            esam_step(expected, base, opt, parts, gamma, 2 if sync == "global" else 1, norm)
            opt.step(losses_of(ddp), *rows_of_rank((x, y)))
            assert_equal_on_ranks(model.parameters())
        assert empty, "no step without a perturbation, which takes a way of its own"
        assert largest_difference(model, expected) < EXACT


def weighted_losses_of(model):
    """Times the size of a layer's gradient, which the loss takes itself, in the forward that selects, too."""

    def losses(x, y):
        rows = losses_of(model)(x, y)
        weight = getattr(model, "module", model)[0].weight
        (g,) = torch.autograd.grad(rows.mean(), weight, retain_graph=True)
        return rows * g.norm()

    return losses


@pytest.mark.ranks(2)
def test_losses_that_differentiate_inside():
    model, expected = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, beta=0.4, model=(ddp := wrap(model)), **SGD)
    for x, y in batches(4, rows=16):
        parts = list(zip(x.chunk(2), y.chunk(2), strict=True))
        esam_step(expected, base, opt, parts, 0.5, 2, "masked", weighted_losses_of)
        opt.step(weighted_losses_of(ddp), *rows_of_rank((x, y)))
        assert_equal_on_ranks(model.parameters())
    assert largest_difference(model, expected) < EXACT


@pytest.mark.ranks(4)
def test_esam_in_groups():
    model, expected = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    ddp = wrap(model)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, beta=0.4, model=ddp, perturb_sync=2, **SGD)
    for x, y in batches(6, rows=16):
        esam_step(expected, base, opt, list(zip(x.chunk(4), y.chunk(4), strict=True)), 0.5, 2, "masked")
        opt.step(losses_of(ddp), *rows_of_rank((x, y)))
        assert_equal_on_ranks(model.parameters())
    assert largest_difference(model, expected) < EXACT


@pytest.mark.ranks(2)
def test_esam_element_mask_is_the_same_on_all_ranks():
    model, expected = mlp(), mlp()
    ddp = wrap(model)
    keywords = {"beta": 0.5, "gamma": 1.0, "mask": "element", "seed": 3, **SGD}
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, **keywords)
    alone = ESAM(expected.parameters(), torch.optim.SGD, 0.1, **keywords)
    for x, y in batches(4):
        opt.step(losses_of(ddp), *rows_of_rank((x, y)))
        alone.step(losses_of(expected), x, y)
    assert largest_difference(model, expected) < EXACT


@pytest.mark.ranks(2)
def test_esam_with_static_graph_and_ragged_batches():
    model = mlp(batchnorm=True)
    opt = ESAM(
        model.parameters(), torch.optim.SGD, 0.1, model=(ddp := wrap(model, static_graph=True)), gamma=1.0, **SGD
    )
    for x, y in batches(4):
        opt.step(losses_of(ddp), *rows_of_rank((x, y)))
    assert_equal_on_ranks(model.parameters())
    model = mlp(batchnorm=True)
    for sync in ("global", "replica"):
        opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=(ddp := wrap(model)), perturb_sync=sync, **SGD)
        for n in (2, 7, 4):  # two rows: rank 0 selects all and runs no forward to select
            x, y = batches(1, rows=n + dist.get_rank())[0]
            opt.step(losses_of(ddp), x, y)
        assert_equal_on_ranks(model.parameters())
