"""ESAM of sharded weights."""

import pytest
import torch
from ddp_steps import EXACT, SGD, mean_loss, rows_of_rank
from problems import batches, losses_of, mlp
from sharding import error_of, gathered, mesh_of, shard

import fastsam
from fastsam import ESAM


@pytest.mark.ranks(2)
@pytest.mark.parametrize("norm", ["masked", "full"])
def test_sharded_esam(norm):
    """The tensor mask is SAM's as on one process; with all rows selected so is the step."""
    expected, model = mlp(), mlp()
    keywords = {"beta": 0.4, "gamma": 1.0, "norm": norm, **SGD}
    empty = 0
    shard(model)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **keywords)
    alone = ESAM(expected.parameters(), torch.optim.SGD, 0.1, **keywords)
    for x, y in batches(12):
        empty += not any(opt._kept())
        opt.step(losses_of(model), *rows_of_rank((x, y)))
        alone.step(losses_of(expected), x, y)
    assert empty, "no step without a perturbation, which takes a way of its own"
    assert error_of(model, expected) < EXACT


def element_masked_step(opt, model, x, y):
    """Take a step; which entries its perturbation moved."""
    before = [p.clone() for p in gathered(model)]
    with opt.ascent():
        mean_loss(model, x, y).backward()
    with opt.descent():
        moved = torch.cat([(p != b).flatten() for p, b in zip(gathered(model), before, strict=True)])
        mean_loss(model, x, y).backward()
    opt.step()
    opt.zero_grad()
    return moved


def element_masks(norm, backend, mesh=None):
    """The element mask is that of one process, bit for bit, and so is the step but for the order of sums."""
    fastsam.set_backend(backend)
    expected, model = mlp(), mlp()
    keywords = {"beta": 0.4, "gamma": 1.0, "mask": "element", "norm": norm, **SGD}
    shard(model, mesh)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **keywords)
    alone = ESAM(expected.parameters(), torch.optim.SGD, 0.1, **keywords)
    try:
        for x, y in batches(4):
            moved = element_masked_step(opt, model, *rows_of_rank((x, y)))
            assert torch.equal(moved, element_masked_step(alone, expected, x, y))
            assert 0.2 < moved.double().mean() < 0.6
    finally:
        fastsam.set_backend(None)
    assert error_of(model, expected) < EXACT


MASKS = [("masked", "torch"), ("masked", "triton"), ("full", "torch"), ("estimated", "torch")]


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(("norm", "backend"), MASKS)
def test_sharded_element_masks(norm, backend):
    element_masks(norm, backend)


@pytest.mark.ranks(4)
def test_element_masks_with_hybrid_sharding():
    element_masks("masked", "torch", mesh_of(2, 2, names=("copy", "shard")))


@pytest.mark.ranks(2)
def test_sharded_esam_selects_rows_of_each_rank():
    expected, model = mlp(), mlp()
    shard(model, reshard_after_forward=False)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, beta=1.0, gamma=0.5, model=model, **SGD)
    base = torch.optim.SGD(expected.parameters(), **SGD)
    losses = losses_of(expected)
    for x, y in batches(4):
        opt.step(losses_of(model), *rows_of_rank((x, y)))
        w = [p.detach().clone() for p in expected.parameters()]
        before = losses(x, y)
        g = torch.autograd.grad(before.mean(), list(expected.parameters()))
        norm = torch.sqrt(sum((gi**2).sum() for gi in g))
        with torch.no_grad():
            for p, gi in zip(expected.parameters(), g, strict=True):
                p.add_(0.1 * gi / norm)
            delta = losses(x, y) - before
        rows = torch.cat([d.topk(3).indices + 6 * r for r, d in enumerate(delta.chunk(2))])
        mean_loss(expected, x[rows], y[rows]).backward()
        with torch.no_grad():
            for p, wi in zip(expected.parameters(), w, strict=True):
                p.copy_(wi)
        base.step()
        base.zero_grad()
    assert error_of(model, expected) < EXACT
