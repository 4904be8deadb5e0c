"""Methods that combine both gradients, with several processes: GSAM and LookSAM under DDP and FSDP2."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_steps import assert_equal_on_ranks, rows_of_rank, wrap
from methods import (
    by_backward,
    by_closure,
    by_contexts,
    by_loss_function,
    by_two_steps,
    gsam_gradient,
    looksam_gradient,
    looksam_vector,
)
from oracle import perturbed_gradients
from problems import batches, losses_of, mlp
from sharding import error_of, gathered, shard

from fastsam import GSAM, LookSAM

WAYS = {
    "loss function": by_loss_function,
    "backward": by_backward,
    "closure": by_closure,
    "contexts": by_contexts,
    "two steps": by_two_steps,
}
METHODS = {"gsam": (GSAM, {"rho": 0.2}), "looksam": (LookSAM, {"rho": 0.2, "k": 2})}
SGD = {"lr": 0.1, "momentum": 0.9}


def build(method, params, **keywords):
    cls, options = METHODS[method]
    return cls(params, torch.optim.SGD, **options, **SGD, **keywords)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_global_step_is_that_of_one_process(method, way, options):
    """Both gradients are means over ranks before they are combined."""
    model, other = mlp(), mlp()
    ddp = wrap(model, **options)
    opt, one = build(method, ddp.parameters(), model=ddp), build(method, other.parameters())
    for batch in batches(5):
        WAYS[way](opt, losses_of(ddp), *rows_of_rank(batch))
        one.step(losses_of(other), *batch)
        assert_equal_on_ranks(model.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["loss function", "closure", "contexts"])
@pytest.mark.parametrize("method", METHODS)
def test_replicas_combine_their_own_gradients_and_step_with_the_mean(method, way):
    model, other = mlp(), mlp()
    ddp = wrap(model, gradient_as_bucket_view=True)
    opt = build(method, ddp.parameters(), model=ddp, perturb_sync="replica")
    base, params, g_v = torch.optim.SGD(other.parameters(), **SGD), list(other.parameters()), None
    for t, (x, y) in enumerate(batches(5)):
        WAYS[way](opt, losses_of(ddp), *rows_of_rank((x, y)))
        found = []
        for part in zip(x.chunk(dist.get_world_size()), y.chunk(dist.get_world_size()), strict=True):
            loss = lambda: F.cross_entropy(other(part[0]), part[1])  # noqa: E731, B023
            found.append(perturbed_gradients(params, loss, 0.2))
        if method == "gsam":
            d = [gsam_gradient(g, g_adv) for g, g_adv in found]
        elif t % 2 == 0:
            d = [g_adv for _, g_adv in found]
            g_v = mean([looksam_vector(g, g_adv) for g, g_adv in found])
        else:
            d = [looksam_gradient(g, g_v) for g, _ in found]
        for p, di in zip(params, mean(d), strict=True):
            p.grad = di
        base.step()
        assert_equal_on_ranks(model.parameters())
        assert_equal_on_ranks([opt.state[p]["fastsam_g_v"] for p in ddp.parameters()] if method == "looksam" else [x])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def mean(lists):
    return [sum(of_param) / len(lists) for of_param in zip(*lists, strict=True)]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_sharded_weights_step_as_whole_ones(method, way):
    model, other = mlp(), mlp()
    shard(model)
    opt, one = build(method, model.parameters(), model=model), build(method, other.parameters())
    for batch in batches(5):
        WAYS[way](opt, losses_of(model), *rows_of_rank(batch))
        one.step(losses_of(other), *batch)
        assert_equal_on_ranks(gathered(model))
    assert error_of(model, other) < 1e-12


@pytest.mark.ranks(2)
def test_pairs_before_one_step_reduce_one_by_one_and_refuse_no_sync():
    model, other = mlp(), mlp()
    ddp = wrap(model)
    opt, one = build("gsam", ddp.parameters(), model=ddp), build("gsam", other.parameters())
    data = batches(2)
    for opt_, net, own in ((opt, ddp, rows_of_rank), (one, other, list)):
        for i, batch in enumerate(data):
            x, y = own(batch)
            with opt_.ascent():
                (F.cross_entropy(net(x), y) / 2).backward()
            with opt_.descent(sync=i == 1):
                (F.cross_entropy(net(x), y) / 2).backward()
        opt_.step()
    assert_equal_on_ranks(model.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    with ddp.no_sync(), pytest.raises(RuntimeError, match="GSAM combines the gradients of every pair"):
        opt.ascent()


@pytest.mark.ranks(2)
def test_the_only_pass_of_a_step_accumulates_as_a_plain_one_does():
    """Two micro-batches in a step of LookSAM that has one pass, each corrected and reduced by itself."""
    model = mlp()
    ddp = wrap(model)
    opt = build("looksam", ddp.parameters(), model=ddp)
    first, *rest = batches(3)
    opt.step(losses_of(ddp), *rows_of_rank(first))
    assert not opt.needs_second_pass
    g_v = [opt.state[p]["fastsam_g_v"] for p in ddp.parameters()]
    expected = [torch.zeros_like(p) for p in model.parameters()]
    opt.zero_grad()
    for x, y in rest:
        g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        expected = [e + d for e, d in zip(expected, looksam_gradient(g, g_v), strict=True)]
        with opt.ascent():
            mine, labels = rows_of_rank((x, y))
            F.cross_entropy(ddp(mine), labels).backward()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-11, atol=1e-13)
    opt.step()
    assert_equal_on_ranks(model.parameters())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_a_step_without_passes_keeps_what_looksam_has_found(sync):
    """torch.distributed.checkpoint takes such a step, with a learning rate of 0, before it loads."""
    model = mlp()
    ddp = wrap(model)
    opt = LookSAM(ddp.parameters(), torch.optim.SGD, rho=0.2, k=1, model=ddp, perturb_sync=sync, **SGD)
    opt.step(losses_of(ddp), *rows_of_rank(batches(1)[0]))
    before = [opt.state[p]["fastsam_g_v"].clone() for p in ddp.parameters()]
    assert any(bool(g_v.any()) for g_v in before)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    for p, g_v in zip(ddp.parameters(), before, strict=True):
        assert torch.equal(opt.state[p]["fastsam_g_v"], g_v)
