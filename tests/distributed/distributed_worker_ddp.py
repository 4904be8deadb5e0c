"""Cases under DistributedDataParallel; see distributed_worker.py."""

import copy
import math
import time
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_worker import assert_equal_on_ranks, case, count_buckets, rows_of_rank, stop, wrap
from oracle import sam_step_on_ranks
from problems import batches, largest_difference, losses_of, mlp
from torch import nn

from fastsam import ESAM, MSAM, SAM

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
EXACT = 1e-12


def mean_loss(model, x, y):
    return F.cross_entropy(model(x), y)


def shard_losses(model, x, y, shards=1):
    """For each rank the mean losses of its shards, for the oracle."""
    return [
        [partial(mean_loss, model, xs, ys) for xs, ys in zip(xr.chunk(shards), yr.chunk(shards), strict=True)]
        for xr, yr in zip(x.chunk(dist.get_world_size()), y.chunk(dist.get_world_size()), strict=True)
    ]


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


WAYS = [with_loss_function, with_closure, with_contexts, with_accumulation]


@case(*[(way, sync) for way in WAYS for sync in ("global", "replica")], (with_two_steps, "global"))
def trajectory(way, sync):
    for bucket_view in (True, False):
        for unused in (True, False):
            for set_to_none in (True, False):
                options = {"gradient_as_bucket_view": bucket_view, "find_unused_parameters": unused}
                train_and_compare(way, sync, set_to_none=set_to_none, **options)
    train_and_compare(way, sync, adaptive=True)
    train_and_compare(way, sync, broadcast_buffers=False)
    train_and_compare(way, sync, bucket_cap_mb=1e-4)


@case(*[(way, sync) for way in (with_pairs, with_synced_pairs) for sync in ("global", "replica")])
def several_pairs(way, sync):
    for bucket_view in (True, False):
        for set_to_none in (True, False):
            for unused in (True, False):
                options = {"gradient_as_bucket_view": bucket_view, "find_unused_parameters": unused}
                if sync == "replica":
                    train_and_compare(way, sync, shards=3, set_to_none=set_to_none, **options)
                else:
                    compare_global_pairs(way, set_to_none, **options)


def compare_global_pairs(way, set_to_none, find_model=True, **options):
    """Pair i of all ranks shares its perturbation, so the oracle sees the pairs as its ranks."""
    expected, model = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    ddp = wrap(model, **options)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp if find_model else None, **SGD)
    for x, y in batches(4, rows=12):
        way(opt, ddp, *rows_of_rank((x, y)), set_to_none=set_to_none)
        losses = [[partial(mean_loss, expected, *pair)] for pair in pairs_of_all_ranks(x, y)]
        sam_step_on_ranks(expected, losses, base, 0.1)
        assert_equal_on_ranks(model.parameters())
    assert largest_difference(model, expected) < EXACT


def pairs_of_all_ranks(x, y, pairs=3):
    """Shard i of every rank, together."""
    by_rank = zip(x.chunk(2), y.chunk(2), strict=True)
    parts = [list(zip(xr.chunk(pairs), yr.chunk(pairs), strict=True)) for xr, yr in by_rank]
    return [[torch.cat(t) for t in zip(*(of_rank[i] for of_rank in parts), strict=True)] for i in range(pairs)]


@case(("global",), ("replica",))
def msam(sync):
    """With 3 shards on each of 2 ranks: 6 perturbations, or 3 that ranks share; the sum is reduced once."""
    for bucket_view in (True, False):
        model, expected = mlp(), mlp()
        base = torch.optim.SGD(expected.parameters(), **SGD)
        ddp = wrap(model, gradient_as_bucket_view=bucket_view)
        seen = count_buckets(ddp)
        opt = MSAM(model.parameters(), torch.optim.SGD, 0.1, num_shards=3, model=ddp, perturb_sync=sync, **SGD)
        for x, y in batches(4):
            seen.clear()
            opt.step(losses_of(ddp), *rows_of_rank((x, y)))
            assert sum(seen) == (3 + 1 if sync == "global" else 1) * sum(p.numel() for p in model.parameters())
            if sync == "replica":
                sam_step_on_ranks(expected, shard_losses(expected, x, y, 3), base, 0.1)
            else:
                losses = [[partial(mean_loss, expected, *pair)] for pair in pairs_of_all_ranks(x, y)]
                sam_step_on_ranks(expected, losses, base, 0.1)
            assert_equal_on_ranks(model.parameters())
        assert largest_difference(model, expected) < EXACT


@case()
def ddp_that_the_optimizer_does_not_know():
    for way in (with_contexts, with_two_steps, with_loss_function):
        train_and_compare(way, "global", find_model=False, gradient_as_bucket_view=True)
    compare_global_pairs(with_synced_pairs, False, find_model=False, gradient_as_bucket_view=True)


@case(("global", 2), ("replica", 1))
def each_parameter_is_reduced_once_a_pass(sync, passes):
    model = mlp()
    ddp = wrap(model, gradient_as_bucket_view=True, bucket_cap_mb=1e-4)
    opt = SAM(model.parameters(), torch.optim.SGD, model=ddp, perturb_sync=sync, **SGD)
    seen = count_buckets(ddp)
    size = sum(p.numel() for p in model.parameters())
    for x, y in batches(3):
        for way, expected in (
            (with_loss_function, passes),
            (with_contexts, passes),
            (with_pairs, 3 * (passes - 1) + 1),
        ):
            seen.clear()
            way(opt, ddp, *rows_of_rank((x, y)))
            assert sum(seen) == expected * size, (way.__name__, seen)
    assert len(seen) > 1, "one bucket cannot show overlap"


@case()
def descents_accumulate_in_the_buckets():
    """Zero copies: p.grad is a view of DDP's bucket before, between and after the descents of several pairs."""
    model = mlp()
    ddp = wrap(model, gradient_as_bucket_view=True)
    opt = SAM(model.parameters(), torch.optim.SGD, model=ddp, perturb_sync="replica", **SGD)
    addresses = []
    for x, y in batches(4):
        x, y = rows_of_rank((x, y))
        for i in range(3):
            with opt.ascent():
                mean_loss(ddp, x, y).backward()
                assert addresses[-1:] != [[p.grad.data_ptr() for p in model.parameters()]]
            with opt.descent(sync=i == 2):
                mean_loss(ddp, x, y).backward()
                addresses.append([p.grad.data_ptr() for p in model.parameters()])
        opt.step()
        opt.zero_grad(set_to_none=False)
    # DDP makes its buckets anew in the second step
    assert all(addresses[i] == addresses[5] for i in range(5, 12))


@case(*[(sync, broadcast) for sync in ("global", "replica") for broadcast in (True, False)])
def batch_norm_statistics_are_those_of_plain_ddp(sync, broadcast):
    model = mlp(batchnorm=True)
    ddp, plain = wrap(model, broadcast_buffers=broadcast), wrap(mlp(batchnorm=True), broadcast_buffers=broadcast)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, perturb_sync=sync, **SGD)
    for x, y in batches(6):
        x, y = rows_of_rank((x, y))
        with torch.no_grad():
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        mean_loss(plain, x, y).backward()
        opt.step(losses_of(ddp), x, y)
        for b, c in zip(model.buffers(), plain.module.buffers(), strict=True):
            assert torch.equal(b, c)
        assert_equal_on_ranks(model.parameters())


@case()
def static_graph():
    for way in (with_loss_function, with_contexts, with_two_steps, with_accumulation_synced):
        train_and_compare(way, "global", static_graph=True)
    for way in (with_loss_function, with_closure, with_contexts, with_pairs):
        for bucket_view in (True, False):
            for set_to_none in (True, False):
                options = {"gradient_as_bucket_view": bucket_view, "set_to_none": set_to_none, "static_graph": True}
                train_and_compare(way, "replica", shards=3 if way is with_pairs else 1, **options)
    model = mlp()
    ddp = wrap(model, static_graph=True)
    count_buckets(ddp)  # a hook of the user's
    opt = SAM(model.parameters(), torch.optim.SGD, model=ddp, perturb_sync="replica", lr=0.1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="but has one already"):
        with_loss_function(opt, ddp, *rows_of_rank(batches(1)[0]))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def with_accumulation_synced(opt, ddp, x, y, set_to_none=True):
    halves = list(zip(x.chunk(2), y.chunk(2), strict=True))
    for context in (opt.ascent, opt.descent):
        with context():
            for xs, ys in halves:
                (mean_loss(ddp, xs, ys) / 2).backward()
    opt.step()
    opt.zero_grad(set_to_none)


class Branches(nn.Module):
    """Rank r uses branch r alone, and nobody uses the last one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.branches = nn.ModuleList(nn.Linear(6, 3) for _ in range(3)).double()
        self.shared = nn.Linear(6, 6).double()
        self.rank = dist.get_rank()

    def forward(self, x):
        return self.branches[self.rank](torch.tanh(self.shared(x)))


@case(("global",), ("replica",))
def parameters_that_not_every_rank_uses(sync):
    model, expected = Branches(), Branches()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    ddp = wrap(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, perturb_sync=sync, **SGD)

    def loss_of_rank(rank, x, y):
        expected.rank = rank
        return mean_loss(expected, x, y)

    for x, y in batches(4):
        with_contexts(opt, ddp, *rows_of_rank((x, y)))
        losses = [[partial(loss_of_rank, r, *part)] for r, part in enumerate(zip(x.chunk(2), y.chunk(2), strict=True))]
        used = [p for name, p in expected.named_parameters() if not name.startswith("branches.2")]
        assert len(used) == 6
        sam_step_on_ranks(expected, losses, base, 0.1, 2 if sync == "global" else 1)
        for name, p in expected.named_parameters():
            if name.startswith("branches.2"):  # torch skips a parameter without a gradient, weight decay included
                p.data.copy_(dict(model.named_parameters())[name])
        assert_equal_on_ranks(model.parameters())
    assert largest_difference(model, expected) < EXACT


@case(("global",), ("replica",))
def ranks_weigh_equally_whatever_their_batch_sizes(sync):
    model, expected = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    ddp = wrap(model)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, perturb_sync=sync, **SGD)
    for x, y in batches(3, rows=12):
        parts = [(x[:9], y[:9]), (x[9:], y[9:])]
        opt.step(losses_of(ddp), *parts[dist.get_rank()])
        losses = [[partial(mean_loss, expected, *part)] for part in parts]
        sam_step_on_ranks(expected, losses, base, 0.1, 2 if sync == "global" else 1)
    assert_equal_on_ranks(model.parameters())
    assert largest_difference(model, expected) < EXACT


def with_gradient_of(values, factor):
    """The identity, whose gradient is multiplied by `factor`."""
    values.register_hook(lambda grad: grad * factor)
    return values


@case(("global",), ("replica",))
def one_ranks_bad_gradient_skips_everywhere(sync):
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


@case((SAM,), (ESAM,))
def a_replica_with_a_bad_ascent(method):
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


@case(*[(way, sync) for way in ("step", "contexts") for sync in ("global", "replica")])
def loss_scaling(way, sync):
    model, expected = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    ddp = wrap(model)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, perturb_sync=sync, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i, (x, y) in enumerate(batches(5)):
        mx, my = rows_of_rank((x, y))
        if i == 2 and dist.get_rank() == 1:
            mx = mx * math.inf
        if way == "step":
            opt.step(losses_of(ddp), mx, my, scaler=scaler)
        else:
            for context in (opt.ascent, opt.descent):
                with context():
                    scaler.scale(mean_loss(ddp, mx, my)).backward()
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
        if i != 2:
            sam_step_on_ranks(expected, shard_losses(expected, x, y), base, 0.1, 2 if sync == "global" else 1)
        assert_equal_on_ranks(model.parameters())
    assert scaler.get_scale() == 2.0**9
    assert int(opt.skipped_steps) == 1
    assert largest_difference(model, expected) < EXACT


@case(("global",), ("replica",))
def resumed_training_is_the_same_bit_for_bit(sync):
    def build():
        model = mlp(batchnorm=True, dropout=0.2)
        ddp = wrap(model)
        return (
            model,
            ddp,
            ESAM(model.parameters(), torch.optim.AdamW, 0.1, gamma=0.5, model=ddp, perturb_sync=sync, lr=0.01),
        )

    data = [rows_of_rank(batch) for batch in batches(6)]
    model, ddp, opt = build()
    for x, y in data[:3]:
        opt.step(losses_of(ddp), x, y)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), torch.get_rng_state()))
    for x, y in data[3:]:
        opt.step(losses_of(ddp), x, y)
    resumed, ddp, opt = build()
    resumed.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    for x, y in data[3:]:
        opt.step(losses_of(ddp), x, y)
    # running statistics of rank 1 are rank 0's from the next forward on
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert_equal_on_ranks(model.parameters())


def esam_step(model, base, opt, parts, gamma, sharing, norm):
    """One step of SPEC 1.3 over ranks, in plain torch. `parts` are the ranks' batches; the mask is the optimizer's."""
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


@case(*[(sync, norm) for sync in ("global", "replica") for norm in ("masked", "full")])
def esam(sync, norm):
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


@case()
def esam_element_mask_is_the_same_on_all_ranks():
    model, expected = mlp(), mlp()
    ddp = wrap(model)
    keywords = {"beta": 0.5, "gamma": 1.0, "mask": "element", "seed": 3, **SGD}
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, **keywords)
    alone = ESAM(expected.parameters(), torch.optim.SGD, 0.1, **keywords)
    for x, y in batches(4):
        opt.step(losses_of(ddp), *rows_of_rank((x, y)))
        alone.step(losses_of(expected), x, y)
    assert largest_difference(model, expected) < EXACT


@case()
def esam_with_static_graph_and_ragged_batches():
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


@case()
def models_that_cannot_have_it():
    plain = mlp()
    with pytest.raises(ValueError, match="needs model="):
        SAM(plain.parameters(), torch.optim.SGD, perturb_sync="replica", lr=0.1)
    ddp = wrap(plain)
    with pytest.raises(ValueError, match="the DistributedDataParallel module that the loss uses"):
        SAM(plain.parameters(), torch.optim.SGD, model=ddp.module, perturb_sync="replica", lr=0.1)
    with pytest.warns(UserWarning, match="plain Sequential"):
        SAM(plain.parameters(), torch.optim.SGD, model=ddp.module, lr=0.1)
    with pytest.raises(ValueError, match="does not divide the 2 ranks"):
        SAM(plain.parameters(), torch.optim.SGD, model=ddp, perturb_sync=3, lr=0.1)
    opt = SAM(plain.parameters(), torch.optim.SGD, model=ddp, perturb_sync="replica", lr=0.1)
    x, y = rows_of_rank(batches(1)[0])
    mean_loss(ddp, x, y).backward()
    with pytest.raises(RuntimeError, match="finds gradients that are reduced already"):
        opt.first_step()
    synced = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    ddp = wrap(synced)
    synced[1] = nn.SyncBatchNorm(4)  # DDP refuses it on the CPU
    with pytest.warns(UserWarning, match="SyncBatchNorm mixes"):
        SAM(synced.parameters(), torch.optim.SGD, model=ddp, perturb_sync="replica", lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SAM(synced.parameters(), torch.optim.SGD, model=ddp, lr=0.1)


@case()
def an_interrupted_pass_leaves_ddp_reducing():
    model = mlp()
    ddp = wrap(model)
    opt = SAM(model.parameters(), torch.optim.SGD, 0.1, model=ddp, perturb_sync="replica", **SGD)
    x, y = rows_of_rank(batches(1)[0])
    for context in (opt.ascent, opt.descent):
        if context == opt.descent:
            with opt.ascent():
                mean_loss(ddp, x, y).backward()
        with pytest.raises(KeyboardInterrupt), context():
            raise KeyboardInterrupt
        assert ddp.require_backward_grad_sync
        opt.zero_grad()
    with_contexts(opt, ddp, x, y)
    assert_equal_on_ranks(model.parameters())


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


@stop
def a_rank_dies():
    def fail():
        raise ZeroDivisionError("rank 1's own mistake")

    step_in_which_rank_1(does=fail)


@stop
def a_rank_lags():
    step_in_which_rank_1(does=partial(time.sleep, 6))


@case(*[(way, sharing) for way in (with_loss_function, with_contexts) for sharing in (1, 2, 4)], world=4)
def groups(way, sharing):
    for bucket_view in (True, False):
        train_and_compare(way, sharing, gradient_as_bucket_view=bucket_view)


@case(world=4)
def esam_in_groups():
    model, expected = mlp(), mlp()
    base = torch.optim.SGD(expected.parameters(), **SGD)
    ddp = wrap(model)
    opt = ESAM(model.parameters(), torch.optim.SGD, 0.1, beta=0.4, model=ddp, perturb_sync=2, **SGD)
    for x, y in batches(6, rows=16):
        esam_step(expected, base, opt, list(zip(x.chunk(4), y.chunk(4), strict=True)), 0.5, 2, "masked")
        opt.step(losses_of(ddp), *rows_of_rank((x, y)))
        assert_equal_on_ranks(model.parameters())
    assert largest_difference(model, expected) < EXACT
