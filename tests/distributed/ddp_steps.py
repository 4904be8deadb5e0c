"""Ways to take a step under DistributedDataParallel, and what its result is compared with."""

import warnings
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import sam_step_on_ranks
from problems import batches, largest_difference, losses_of, mlp
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAM

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
EXACT = 1e-12


def rows_of_rank(tensors, shards=1):
    """This rank's equal part of each batch tensor."""
    return [t.chunk(dist.get_world_size())[dist.get_rank()] for t in tensors]


def assert_equal_on_ranks(tensors, what="weights"):
    """Bit for bit."""
    own = torch.cat([t.detach().double().reshape(-1) for t in tensors])
    everywhere = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, own)
    assert all(torch.equal(own, other) for other in everywhere), f"{what} differ between ranks"


def wrap(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers gives way to forward_sync_buffers
        return DistributedDataParallel(model, **options)


def count_buckets(ddp):
    """Numbers of elements that DDP reduces from now on, bucket by bucket."""
    seen = []

    def hook(_, bucket):
        seen.append(bucket.buffer().numel())
        mean = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    return seen


def mean_loss(model, x, y):
    return F.cross_entropy(model(x), y)


def shard_losses(model, x, y, shards=1):
    """For each rank the mean losses of its shards, for the oracle."""
    return [
        [partial(mean_loss, model, xs, ys) for xs, ys in zip(xr.chunk(shards), yr.chunk(shards), strict=True)]
        for xr, yr in zip(x.chunk(dist.get_world_size()), y.chunk(dist.get_world_size()), strict=True)
    ]


def pairs_of_all_ranks(x, y, pairs=3):
    """Shard i of every rank, together."""
    by_rank = zip(x.chunk(2), y.chunk(2), strict=True)
    parts = [list(zip(xr.chunk(pairs), yr.chunk(pairs), strict=True)) for xr, yr in by_rank]
    return [[torch.cat(t) for t in zip(*(of_rank[i] for of_rank in parts), strict=True)] for i in range(pairs)]


def with_loss_function(opt, ddp, x, y, set_to_none=True):
    opt.step(losses_of(ddp), x, y)


def with_closure(opt, ddp, x, y, set_to_none=True):
    def closure():
        opt.zero_grad(set_to_none)
        loss = mean_loss(ddp, x, y)
        loss.backward()
        return loss

    opt.step(closure)
    opt.zero_grad(set_to_none)


def with_contexts(opt, ddp, x, y, set_to_none=True):
    with opt.ascent():
        mean_loss(ddp, x, y).backward()
    with opt.descent():
        mean_loss(ddp, x, y).backward()
    opt.step()
    opt.zero_grad(set_to_none)


def with_two_steps(opt, ddp, x, y, set_to_none=True):
    mean_loss(ddp, x, y).backward()
    opt.first_step(zero_grad=True)
    mean_loss(ddp, x, y).backward()
    opt.second_step(zero_grad=True)


def with_pairs(opt, ddp, x, y, set_to_none=True, pairs=3, sync=False):
    for i, (xs, ys) in enumerate(zip(x.chunk(pairs), y.chunk(pairs), strict=True)):
        with opt.ascent():
            mean_loss(ddp, xs, ys).backward()
        with opt.descent(sync=sync or i == pairs - 1):
            (mean_loss(ddp, xs, ys) / pairs).backward()
    opt.step()
    opt.zero_grad(set_to_none)


def with_synced_pairs(opt, ddp, x, y, set_to_none=True):
    with_pairs(opt, ddp, x, y, set_to_none, sync=True)


def with_unreduced_pairs(opt, ddp, x, y, set_to_none=True, pairs=3):
    """All but the last pair under DDP's own no_sync(), as frameworks accumulate."""
    for i, (xs, ys) in enumerate(zip(x.chunk(pairs), y.chunk(pairs), strict=True)):
        with ddp.no_sync() if i < pairs - 1 else nullcontext():
            with opt.ascent():
                mean_loss(ddp, xs, ys).backward()
            with opt.descent():
                (mean_loss(ddp, xs, ys) / pairs).backward()
    opt.step()
    opt.zero_grad(set_to_none)


def with_unreduced_ascent(opt, ddp, x, y, set_to_none=True):
    """no_sync() is entered inside of the pass."""
    with opt.ascent(), ddp.no_sync():
        mean_loss(ddp, x, y).backward()
    with opt.descent():
        mean_loss(ddp, x, y).backward()
    opt.step()
    opt.zero_grad(set_to_none)


def with_unreduced_first_step(opt, ddp, x, y, set_to_none=True):
    """davda54/sam's advice for several processes."""
    with ddp.no_sync():
        mean_loss(ddp, x, y).backward()
    opt.first_step(zero_grad=True)
    mean_loss(ddp, x, y).backward()
    opt.second_step(zero_grad=True)


def with_accumulation(opt, ddp, x, y, set_to_none=True):
    """One pair over two backwards; the descent's first is left unreduced in DDP's own way."""
    halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
    with opt.ascent():
        for xs, ys in halves:
            (mean_loss(ddp, xs, ys) / 2).backward()
    with opt.descent():
        with ddp.no_sync():
            (mean_loss(ddp, *halves[0]) / 2).backward()
        (mean_loss(ddp, *halves[1]) / 2).backward()
    opt.step()
    opt.zero_grad(set_to_none)


def with_accumulation_synced(opt, ddp, x, y, set_to_none=True):
    halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
    for context in (opt.ascent, opt.descent):
        with context():
            for xs, ys in halves:
                (mean_loss(ddp, xs, ys) / 2).backward()
    opt.step()
    opt.zero_grad(set_to_none)


def train_and_compare(way, sync, shards=1, set_to_none=True, adaptive=False, rows=12, find_model=True, **options):
    """Five steps against the oracle, and ranks against each other."""
    world = dist.get_world_size()
    expected, model = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    ddp = wrap(model, **options)
    opt = SAM(
        model.parameters(), torch.optim.SGD, 0.1, adaptive, model=ddp if find_model else None, perturb_sync=sync, **SGD
    )
    sharing = {"global": world, "replica": 1}.get(sync, sync)
    for x, y in batches(5, rows=rows):
        way(opt, ddp, *rows_of_rank((x, y)), set_to_none=set_to_none)
        sam_step_on_ranks(expected, shard_losses(expected, x, y, shards), base, 0.1, sharing, adaptive)
        assert_equal_on_ranks(model.parameters())
    error = largest_difference(model, expected)
    assert error < EXACT, error
    assert largest_difference(model, mlp()) > 1e-2, "nothing was trained"
