"""SAM under DistributedDataParallel takes the step of the equations over ranks, in every way of stepping."""

import copy
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from ddp_steps import (
    EXACT,
    SGD,
    assert_equal_on_ranks,
    count_buckets,
    mean_loss,
    pairs_of_all_ranks,
    rows_of_rank,
    shard_losses,
    train_and_compare,
    with_accumulation,
    with_accumulation_synced,
    with_closure,
    with_contexts,
    with_loss_function,
    with_pairs,
    with_synced_pairs,
    with_two_steps,
    with_unreduced_ascent,
    with_unreduced_first_step,
    with_unreduced_pairs,
    wrap,
)
from oracle import sam_step_on_ranks
from problems import batches, largest_difference, losses_of, mlp
from torch import nn

from fastsam import ESAM, MSAM, SAM

WAYS = [with_loss_function, with_closure, with_contexts, with_accumulation]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("way", "sync"), [*product(WAYS, ("global", "replica")), (with_two_steps, "global")])
def test_trajectory(way, sync):
    for bucket_view in (True, False):
        for unused in (True, False):
            for set_to_none in (True, False):
                options = {"gradient_as_bucket_view": bucket_view, "find_unused_parameters": unused}
                train_and_compare(way, sync, set_to_none=set_to_none, **options)
    train_and_compare(way, sync, adaptive=True)
    train_and_compare(way, sync, broadcast_buffers=False)
    train_and_compare(way, sync, bucket_cap_mb=1e-4)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", [with_pairs, with_synced_pairs, with_unreduced_pairs])
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_several_pairs(way, sync):
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_msam(sync):
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", [with_unreduced_ascent, with_unreduced_first_step])
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_an_ascent_that_nobody_has_reduced(way, sync):
    """With "global" it is averaged by fastsam itself, and the user's p.grad is left alone."""
    for bucket_view in (True, False):
        for unused in (True, False):
            train_and_compare(way, sync, gradient_as_bucket_view=bucket_view, find_unused_parameters=unused)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", [with_loss_function, with_closure])
def test_a_whole_step_under_no_sync_is_refused(way, inside, sync):
    """Its update would let ranks drift apart; no_sync() is entered around the step, or by what it calls."""
    model = mlp()
    ddp = wrap(model)
    opt = SAM(model.parameters(), torch.optim.SGD, model=ddp, perturb_sync=sync, **SGD)
    batch = rows_of_rank(batches(1)[0])

    def unreduced(x):
        with ddp.no_sync():
            return ddp(x)

    way(opt, ddp, *batch)
    before = [p.clone() for p in model.parameters()]
    refused = pytest.raises(RuntimeError, match=r"no_sync\(\).*ranks would drift apart.*opt.ascent")
    with nullcontext() if inside else ddp.no_sync(), refused:
        way(opt, unreduced if inside else ddp, *batch)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    way(opt, ddp, *batch)
    assert_equal_on_ranks(model.parameters())


@pytest.mark.ranks(2)
def test_a_closure_may_look_at_the_model_without_gradients():
    """After which DDP, too, says that its last forward reduces nothing."""
    model = mlp()
    ddp = wrap(model)
    opt = SAM(model.parameters(), torch.optim.SGD, model=ddp, **SGD)
    x, y = rows_of_rank(batches(1)[0])

    def closure():
        opt.zero_grad()
        mean_loss(ddp, x, y).backward()
        with torch.no_grad():
            return mean_loss(ddp, x, y)

    before = [p.clone() for p in model.parameters()]
    opt.step(closure)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert_equal_on_ranks(model.parameters())


@pytest.mark.ranks(2)
def test_ddp_that_the_optimizer_does_not_know():
    for way in (with_contexts, with_two_steps, with_loss_function):
        train_and_compare(way, "global", find_model=False, gradient_as_bucket_view=True)
    compare_global_pairs(with_synced_pairs, False, find_model=False, gradient_as_bucket_view=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("sync", "passes"), [("global", 2), ("replica", 1)])
def test_each_parameter_is_reduced_once_a_pass(sync, passes):
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


@pytest.mark.ranks(2)
def test_descents_accumulate_in_the_buckets():
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
@pytest.mark.parametrize("broadcast", [True, False])
def test_batch_norm_statistics_are_those_of_plain_ddp(sync, broadcast):
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


@pytest.mark.ranks(2)
def test_static_graph():
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_parameters_that_not_every_rank_uses(sync):
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_ranks_weigh_equally_whatever_their_batch_sizes(sync):
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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("sync", ["global", "replica"])
def test_resumed_training_is_the_same_bit_for_bit(sync):
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


@pytest.mark.ranks(2)
def test_models_that_cannot_have_it():
    """What cannot be had is refused when the first step begins, before anything has changed."""
    plain, (x, y) = mlp(), rows_of_rank(batches(1)[0])
    before = [p.clone() for p in plain.parameters()]
    ddp = wrap(plain)
    for model, sync, reason in (
        (None, "replica", "needs model="),
        (ddp.module, "replica", "the DistributedDataParallel module that the loss uses"),
        (ddp, 3, "does not divide the 2 ranks"),
    ):
        for way in (with_loss_function, with_closure, with_contexts, with_two_steps):
            opt = SAM(plain.parameters(), torch.optim.SGD, model=model, perturb_sync=sync, lr=0.1)
            with pytest.raises(ValueError, match=reason):
                way(opt, ddp, x, y)
    assert all(torch.equal(p, b) for p, b in zip(plain.parameters(), before, strict=True))
    opt = SAM(plain.parameters(), torch.optim.SGD, model=ddp, perturb_sync="replica", lr=0.1)
    opt.zero_grad()
    mean_loss(ddp, x, y).backward()
    with pytest.raises(RuntimeError, match="finds gradients that are reduced already"):
        opt.first_step()
    synced = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    ddp = wrap(synced)
    layer = nn.SyncBatchNorm(4).double().eval()  # DDP refuses it on the CPU, where it runs in eval mode alone
    layer.weight, layer.bias, synced[1] = synced[1].weight, synced[1].bias, layer
    opt = SAM(synced.parameters(), torch.optim.SGD, model=ddp, perturb_sync="replica", lr=0.1)
    with pytest.warns(UserWarning, match="SyncBatchNorm mixes"):
        opt.step(losses_of(ddp), x, y)
    # warnings are errors here
    SAM(synced.parameters(), torch.optim.SGD, model=ddp, lr=0.1).step(losses_of(ddp), x, y)


@pytest.mark.ranks(2)
def test_an_interrupted_pass_leaves_ddp_reducing():
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


@pytest.mark.ranks(4)
@pytest.mark.parametrize("way", [with_loss_function, with_contexts])
@pytest.mark.parametrize("sharing", [1, 2, 4])
def test_groups(way, sharing):
    for bucket_view in (True, False):
        train_and_compare(way, sharing, gradient_as_bucket_view=bucket_view)
