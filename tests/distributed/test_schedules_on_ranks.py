"""Schedules under DDP: an inactive step is plain DDP's, bit for bit and reduced once; an active one the method's."""

import pytest
import torch
import torch.nn.functional as F
from ddp_steps import assert_equal_on_ranks, count_buckets, rows_of_rank, wrap
from problems import assert_same, batches, losses_of, mlp, snapshot

from fastsam import ESAM, GSAM, MSAM, SAM, LookSAM
from fastsam.schedule import Every, First, Last

SGD = {"lr": 0.1, "momentum": 0.9}
STEPS = 4
METHODS = {
    "sam": (SAM, {"rho": 0.2}),
    "sam, replica": (SAM, {"rho": 0.2, "perturb_sync": "replica"}),
    "esam": (ESAM, {"rho": 0.2, "gamma": 1.0, "beta": 0.6, "seed": 4}),
    "msam": (MSAM, {"rho": 0.2, "num_shards": 2}),
    "gsam": (GSAM, {"rho": 0.2}),
    "gsam, replica": (GSAM, {"rho": 0.2, "perturb_sync": "replica"}),
    "looksam": (LookSAM, {"rho": 0.2, "k": 1}),
}


def by_loss_function(opt, losses, *batch):
    opt.step(losses, *batch)


def by_backward(opt, losses, *batch):
    opt.zero_grad()
    opt.backward(losses, *batch)
    opt.step()


def by_contexts(opt, losses, *batch):
    opt.zero_grad()
    shards = isinstance(opt, MSAM) and opt.needs_second_pass
    for part in zip(*(t.chunk(2) for t in batch), strict=True) if shards else [batch]:
        with opt.ascent():
            losses(*part).mean().backward()
        if opt.needs_second_pass:
            with opt.descent():
                losses(*part).mean().backward()
    opt.step()


def by_plain_loop(opt, losses, *batch):
    opt.zero_grad()
    losses(*batch).mean().backward()
    opt.step()


WAYS = {"loss function": by_loss_function, "backward": by_backward, "contexts": by_contexts}


def build(method, ddp, **keywords):
    cls, options = METHODS[method]
    return cls(ddp.parameters(), torch.optim.SGD, model=ddp, **options, **keywords, **SGD)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
@pytest.mark.parametrize("way", [*WAYS, "plain loop"])
@pytest.mark.parametrize("method", METHODS)
def test_an_inactive_step_is_plain_ddps(method, way, options):
    model, other = mlp(batchnorm=True), mlp(batchnorm=True)
    ddp, plain = wrap(model, **options), wrap(other, **options)
    reduced = count_buckets(ddp)
    count_buckets(plain)
    opt, base = build(method, ddp, when=Last(0.2, 5)), torch.optim.SGD(plain.parameters(), **SGD)
    for batch in batches(STEPS):
        reduced.clear()
        ours, mine = losses_of(ddp), rows_of_rank(batch)
        assert not opt.needs_second_pass
        (by_plain_loop if way == "plain loop" else WAYS[way])(opt, ours, *mine)
        by_plain_loop(base, losses_of(plain), *mine)
        assert sum(reduced) == sum(p.numel() for p in model.parameters())
        assert_same(model, snapshot(other))
    assert_equal_on_ranks(model.parameters())
    assert opt.needs_second_pass


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_phases_follow_each_other_as_in_two_trainings(method, way):
    """Every second step; the active ones are those of the method around the same base."""
    model, other = mlp(), mlp()
    ddp, twin = wrap(model), wrap(other)
    opt = build(method, ddp, when=Every(2))
    always = build(method, twin)
    for t, batch in enumerate(batches(5)):
        mine = rows_of_rank(batch)
        WAYS[way](opt, losses_of(ddp), *mine)
        if t % 2 == 0:
            WAYS[way](always, losses_of(twin), *mine)
        else:
            by_plain_loop(always.base_optimizer, losses_of(twin), *mine)
        assert_equal_on_ranks(model.parameters())
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), (t, (p - q).abs().max())


@pytest.mark.ranks(2)
def test_inactive_micro_batches_accumulate_under_no_sync_and_reduce_once():
    """Also of a method that otherwise combines and reduces pair by pair."""
    model, other = mlp(), mlp()
    ddp, plain = wrap(model), wrap(other)
    reduced = count_buckets(ddp)
    count_buckets(plain)
    opt, base = build("gsam", ddp, when=First(0.5, 2)), torch.optim.SGD(plain.parameters(), **SGD)
    state = opt.state_dict()
    state["param_groups"][0]["fastsam_taken"] = 1
    opt.load_state_dict(state)
    first, last = (rows_of_rank(batch) for batch in batches(2))
    with ddp.no_sync(), opt.ascent():
        F.cross_entropy(ddp(first[0]), first[1]).backward()
    assert reduced == []
    with opt.ascent():
        F.cross_entropy(ddp(last[0]), last[1]).backward()
    assert sum(reduced) == sum(p.numel() for p in model.parameters())
    with plain.no_sync():
        F.cross_entropy(plain(first[0]), first[1]).backward()
    F.cross_entropy(plain(last[0]), last[1]).backward()
    opt.step()
    base.step()
    assert_same(model, snapshot(other))
