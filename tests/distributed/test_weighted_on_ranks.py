"""`fastsam.Weighted` on ranks whose rows weigh differently: with total= they count as on one process."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from ddp_steps import assert_equal_on_ranks, rows_of_rank, wrap
from problems import batches, mlp, snapshot
from sharding import gathered, shard
from torch.optim.lr_scheduler import LambdaLR

from fastsam import ESAM, MSAM, SAM, Weighted

RANKS = 2


def weighted_batches(count, seed=0):
    for x, y in batches(count, seed=seed):
        # the first rank's rows weigh most
        yield x, y, torch.linspace(3, 0, len(x), dtype=x.dtype)


def losses_of(model, total=None):
    return lambda x, y, w: Weighted(F.cross_entropy(model(x), y, reduction="none"), w, total)


def sgd(cls, model, params=None, **options):
    params = list(model.parameters()) if params is None else params
    return cls(params, torch.optim.SGD, 0.2, lr=0.1, momentum=0.9, model=model, **options)


def share_of(batch):
    """What DDP's mean over ranks makes the sum of all ranks' weights."""
    return batch[2].sum().item() / RANKS


def assert_close(some, other):
    for p, q in zip(some.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("shards", [0, 1, 3], ids=["sam", "msam of 1", "msam of 3"])
@pytest.mark.parametrize("views", [False, True], ids=["", "views"])
def test_the_sum_over_ranks_makes_them_one_process(shards, views):
    model, other = mlp(), mlp()
    ddp = wrap(model, gradient_as_bucket_view=views)
    opt = sgd(MSAM, ddp, num_shards=shards) if shards else sgd(SAM, ddp)
    # a replica of each rank perturbs by itself
    one = sgd(MSAM, other, num_shards=RANKS * shards) if shards else sgd(SAM, other)
    for batch in weighted_batches(4):
        opt.step(losses_of(ddp, share_of(batch)), *rows_of_rank(batch))
        one.step(losses_of(other), *batch)
        assert_equal_on_ranks(model.parameters())
        assert_close(model, other)


@pytest.mark.ranks(RANKS)
@pytest.mark.parametrize("views", [False, True], ids=["", "views"])
@pytest.mark.parametrize("total", [False, True], ids=["", "total"])
def test_micro_batches_of_shards_under_no_sync(total, views):
    """Without total= each call's own mean counts, and the last shard's weight comes last, in the reduced backward."""
    model, other = mlp(), mlp()
    ddp, copies = wrap(model, gradient_as_bucket_view=views), [mlp() for _ in range(RANKS)]
    opt = sgd(MSAM, ddp, num_shards=2)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        micro = list(weighted_batches(2, seed=step))
        whole = sum(batch[2].sum().item() for batch in micro) / RANKS if total else None
        for i, batch in enumerate(micro):
            with ddp.no_sync() if i == 0 else nullcontext():
                opt.backward(losses_of(ddp, whole), *rows_of_rank(batch))
        opt.step()
        opt.zero_grad()
        d = [torch.zeros_like(p) for p in other.parameters()]
        for rank, twin in enumerate(copies):
            twin.load_state_dict(snapshot(other))
            alone = sgd(MSAM, twin, num_shards=2)
            for batch in micro:
                alone.backward(losses_of(twin, whole), *(t.chunk(RANKS)[rank] for t in batch))
            d = [d_n + p.grad / RANKS for d_n, p in zip(d, twin.parameters(), strict=True)]
            alone.zero_grad()
        for p, d_n in zip(other.parameters(), d, strict=True):
            p.grad = d_n
        plain.step()
        assert_equal_on_ranks(model.parameters())
        assert_close(model, other)


@pytest.mark.ranks(RANKS)
def test_esam_selects_on_each_rank():
    model, copies = mlp(), [mlp() for _ in range(RANKS)]
    ddp = wrap(model)
    opt = sgd(ESAM, ddp, beta=1.0)
    batch = next(weighted_batches(1))
    weights = [p.detach().clone() for p in model.parameters()]
    opt.step(losses_of(ddp, share_of(batch)), *rows_of_rank(batch))
    assert_equal_on_ranks(model.parameters())
    # the ascent is that of all rows, the rows are each rank's own
    whole = mlp()
    g = torch.autograd.grad(
        (F.cross_entropy(whole(batch[0]), batch[1], reduction="none") * batch[2]).sum(), list(whole.parameters())
    )
    norm = torch.stack([g_n.square().sum() for g_n in g]).sum().sqrt()
    d = [torch.zeros_like(p) for p in weights]
    for rank, twin in enumerate(copies):
        x, y, w = (t.chunk(RANKS)[rank] for t in batch)
        before = F.cross_entropy(twin(x), y, reduction="none").detach()
        with torch.no_grad():
            for p, g_n in zip(twin.parameters(), g, strict=True):
                p.add_(0.2 * g_n / norm)
        after = F.cross_entropy(twin(x), y, reduction="none")
        delta = (w * (after.detach() - before)).masked_fill(w == 0, -torch.inf)
        chosen = delta.argsort(descending=True, stable=True)[: len(x) // 2]
        loss = (w * after)[chosen].sum() / w[chosen].sum() * w.sum() / share_of(batch)
        found = torch.autograd.grad(loss, list(twin.parameters()))
        d = [d_n + v / RANKS for d_n, v in zip(d, found, strict=True)]
    for p, w, d_n in zip(model.parameters(), weights, d, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * d_n, rtol=1e-10, atol=1e-12)


@pytest.mark.ranks(RANKS)
def test_sharded_weights_need_the_total_for_shards():
    model, other = mlp(), mlp()
    shard(model)
    opt, one = sgd(MSAM, model, num_shards=2), sgd(MSAM, other, num_shards=2)
    for batch in weighted_batches(3):
        before = gathered(model)
        with pytest.raises(ValueError, match="with weighting='sample' pass total="):
            opt.step(losses_of(model), *rows_of_rank(batch))
        assert all(map(torch.equal, gathered(model), before))
        opt.zero_grad()
        opt.step(losses_of(model, share_of(batch)), *rows_of_rank(batch))
        # shard i of all ranks shares its perturbation
        order = torch.cat([torch.cat([shard_rows(len(batch[0]), r, i) for r in range(RANKS)]) for i in range(2)])
        one.step(losses_of(other), *(t[order] for t in batch))
        for p, q in zip(gathered(model), other.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-10, atol=1e-12)


def shard_rows(n, rank, i):
    return torch.arange(n).chunk(RANKS)[rank].tensor_split(2)[i]


@pytest.mark.ranks(RANKS)
def test_a_loop_over_sharded_weights_accumulates_by_the_count_of_all_tokens():
    """As pretraining loops over FSDP2 have it: a count over ranks and micro-batches, clipping, a schedule."""
    model, other = mlp(), mlp()
    shard(model)
    both = [SAM(m.parameters(), torch.optim.AdamW, 0.2, lr=0.05, model=m) for m in (model, other)]
    schedules = [LambdaLR(opt, lambda step: 1 - step / 10) for opt in both]
    for step in range(3):
        micro_batches = list(weighted_batches(2, seed=step))
        tokens = sum(batch[2].sum().item() for batch in micro_batches)
        for batch in micro_batches:
            both[0].backward(losses_of(model, tokens / RANKS), *rows_of_rank(batch))
            both[1].backward(losses_of(other, tokens), *batch)
        for m, opt, schedule in zip((model, other), both, schedules, strict=True):
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            opt.step()
            opt.zero_grad()
            schedule.step()
        for p, q in zip(gathered(model), other.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-9, atol=1e-11)
