"""A gradient that is not finite, a loss scale, and a rank that stops: all ranks answer alike."""

import math
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_steps import EXACT, SGD, assert_equal_on_ranks, mean_loss, rows_of_rank, shard_losses, wrap
from oracle import sam_step_on_ranks
from problems import batches, largest_difference, losses_of, mlp
from ranks import Ranks
from sharding import ADAMW, error_of, gathered, shard

from fastsam import ESAM, SAM


def with_gradient_of(values, factor):
    """The identity, whose gradient is multiplied by `factor`."""
    values.register_hook(lambda grad: grad * factor)
    return values


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_one_ranks_bad_gradient_skips_everywhere(sync):
    model = mlp()
    ddp = wrap(model)
    opt = SAM(model.parameters(), torch.optim.AdamW, 0.1, model=ddp, perturb_sync=sync, lr=0.01)
    for i, (x, y) in enumerate(batches(3)):
        x, y = rows_of_rank((x, y))
        if i == 1 and dist.get_rank() == 1:
            x = x * math.inf
        before = [p.clone() for p in model.parameters()]
        opt.step(losses_of(ddp), x, y)
        unchanged = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert unchanged == (i == 1)
        assert_equal_on_ranks(model.parameters())
        assert_equal_on_ranks([opt.skipped_steps])
    assert int(opt.skipped_steps) == 1


@pytest.mark.ranks(2)
def test_sharded_bad_gradient_skips_everywhere():
    model = mlp()
    shard(model)
    opt = SAM(model.parameters(), torch.optim.AdamW, 0.1, model=model, **ADAMW)
    for i, (x, y) in enumerate(batches(3)):
        before = [p.clone() for p in gathered(model)]
        mine = rows_of_rank((x, y))
        opt.step(losses_of(model), *mine)
        assert_equal_on_ranks([*gathered(model), opt.skipped_steps, opt.last_grad_norm])
        if i == 0:  # an infinite entry of one rank's shard alone
            with opt.ascent():
                mean_loss(model, *mine).backward()
            with opt.descent():
                mean_loss(model, *mine).backward()
            before = [p.clone() for p in gathered(model)]
            if dist.get_rank() == 1:
                model[0].weight.grad.to_local()[0, 0] = math.inf
            opt.step()
            opt.zero_grad()
            assert all(torch.equal(p, b) for p, b in zip(gathered(model), before, strict=True))
        else:
            assert not any(torch.equal(p, b) for p, b in zip(gathered(model), before, strict=True))
    assert int(opt.skipped_steps) == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("method", [SAM, ESAM])
def test_a_replica_with_a_bad_ascent(method):
    """SAM: that rank alone does not perturb. ESAM: everybody skips the step."""
    model, expected = mlp(), mlp()
    ddp = wrap(model)
    keywords = {"gamma": 1.0, "beta": 1.0} if method is ESAM else {}
    opt = method(model.parameters(), torch.optim.SGD, 0.1, model=ddp, perturb_sync="replica", **keywords, **SGD)
    x, y = batches(1)[0]
    mine = rows_of_rank((x, y))
    with opt.ascent():
        factor = math.nan if dist.get_rank() == 1 else 1.0
        F.cross_entropy(with_gradient_of(ddp(mine[0]), factor), mine[1]).backward()
    with opt.descent():
        mean_loss(ddp, *mine).backward()
    opt.step()
    assert_equal_on_ranks(model.parameters())
    assert int(opt.skipped_steps) == (method is ESAM)
    if method is SAM:
        halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
        base = torch.optim.SGD(expected.parameters(), **SGD)
        alone = mlp()
        sam_step_on_ranks(
            alone, [[partial(mean_loss, alone, *halves[0])]], torch.optim.SGD(alone.parameters(), lr=1.0), 0.1
        )
        d0 = [p - q for p, q in zip(mlp().parameters(), alone.parameters(), strict=True)]
        d1 = torch.autograd.grad(mean_loss(expected, *halves[1]), list(expected.parameters()))
        for p, a, b in zip(expected.parameters(), d0, d1, strict=True):
            p.grad = ((a + b) / 2).detach()
        base.step()
    assert largest_difference(model, expected) < EXACT


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["step", "contexts"])
@pytest.mark.parametrize("sharing", ["global", "replica", "sharded"])
def test_loss_scaling(way, sharing):
    """Rank 1's overflow in the third step skips it everywhere and halves the scale."""
    model, expected = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    if sharing == "sharded":
        parallel = shard(model)
        opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=model, **SGD)
        options = {"clip_grad_norm": 1e6}
    else:
        parallel = wrap(model)
        opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=parallel, perturb_sync=sharing, **SGD)
        options = {}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, (x, y) in enumerate(batches(5)):
        mx, my = rows_of_rank((x, y))
        if i == 2 and dist.get_rank() == 1:
            mx = mx * math.inf
        if way == "step":
            opt.step(losses_of(parallel), mx, my, scaler=scaler, **options)
        else:
            for context in (opt.ascent, opt.descent):
                with context():
                    scaler.scale(mean_loss(parallel, mx, my)).backward()
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
        if i != 2:
            sam_step_on_ranks(expected, shard_losses(expected, x, y), base, 0.1, 1 if sharing == "replica" else 2)
        assert_equal_on_ranks(gathered(model))
    assert scaler.get_scale() == 2.0**9
    assert int(opt.skipped_steps) == 1
    assert error_of(model, expected) < EXACT


def step_in_which_rank_1(does):
    """ESAM's ascent leaves gradients out, and reduces the others in a call of its own."""
    model = mlp()
    ddp = wrap(model)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, gamma=1.0, model=ddp, **SGD)

    def losses(x, y):
        if dist.get_rank() == 1:
            does()
        return losses_of(ddp)(x, y)

    x, y = rows_of_rank(batches(1)[0])
    before = [p.clone() for p in model.parameters()]
    try:
        opt.step(losses, x, y)
    finally:
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def a_rank_dies():
    def fail():
        raise ZeroDivisionError("rank 1's own mistake")

    step_in_which_rank_1(does=fail)


def a_rank_lags():
    step_in_which_rank_1(does=partial(time.sleep, 6))


@pytest.mark.parametrize(
    ("stop", "reason"),
    [(a_rank_dies, "ZeroDivisionError: rank 1's own mistake"), (a_rank_lags, "fastsam could not reduce")],
)
def test_every_rank_has_an_error_soon_after_one_stops(stop, reason):
    started = time.monotonic()
    with Ranks(2, collective_patience=3) as ranks:
        errors = ranks.call(stop)
    assert "fastsam could not reduce the ascent gradient on rank 0: another rank has stopped" in errors[0]
    assert reason in errors[1]
    assert time.monotonic() - started < 60
