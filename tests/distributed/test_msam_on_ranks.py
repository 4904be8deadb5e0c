"""mSAM with several processes: ranks times local shards perturbations, and one reduction a step."""

import pytest
import torch
import torch.distributed as dist
from ddp_steps import assert_equal_on_ranks, count_buckets, rows_of_rank, wrap
from problems import batches, losses_of, mlp
from sharding import error_of, gathered, shard

from fastsam import MSAM

KNOBS = {"rho": 0.2, "lr": 0.2, "momentum": 0.9}


def interleaved(tensors, shards):
    """The rows of all ranks in the order that makes the ranks' i-th shards neighbours."""
    world = dist.get_world_size()
    return [torch.cat([part.chunk(shards)[i] for i in range(shards) for part in t.chunk(world)]) for t in tensors]


SHARDS = ("replica", 1), ("replica", 2), ("replica", 4), ("global", 1), ("global", 3)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize(("sync", "shards"), SHARDS)
def test_msam_under_ddp_is_msam_in_one_process(sync, shards, static_graph):
    """Invariant 30 of docs/algorithms.md: m shards a rank are m W perturbations, or with "global" m of W parts each."""
    world = dist.get_world_size()
    model, other = mlp(), mlp()
    ddp = wrap(model, static_graph=static_graph)
    opt = MSAM(ddp.parameters(), torch.optim.SGD, num_shards=shards, model=ddp, perturb_sync=sync, **KNOBS)
    number = shards * world if sync == "replica" else shards
    one = MSAM(other.parameters(), torch.optim.SGD, num_shards=number, **KNOBS)
    for batch in batches(5, rows=24):
        opt.step(losses_of(ddp), *rows_of_rank(batch))
        one.step(losses_of(other), *(batch if sync == "replica" else interleaved(batch, shards)))
        assert_equal_on_ranks(model.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}])
def test_msam_reduces_once_a_step(options):
    model = mlp()
    ddp = wrap(model, **options)
    reduced = count_buckets(ddp)
    opt = MSAM(ddp.parameters(), torch.optim.SGD, num_shards=3, model=ddp, perturb_sync="replica", **KNOBS)
    parameters = sum(p.numel() for p in model.parameters())
    for batch in batches(4, rows=24):
        reduced.clear()
        opt.step(losses_of(ddp), *rows_of_rank(batch))
        assert sum(reduced) == parameters
    assert_equal_on_ranks(model.parameters())


@pytest.mark.ranks(2)
def test_msam_of_sharded_weights_is_msam_in_one_process():
    """Under FSDP2 each shard's perturbation is global: the ranks' i-th parts make up shard i."""
    model, other = mlp(), mlp()
    shard(model)
    opt = MSAM(model.parameters(), torch.optim.SGD, num_shards=3, model=model, **KNOBS)
    one = MSAM(other.parameters(), torch.optim.SGD, num_shards=3, **KNOBS)
    for batch in batches(4, rows=24):
        opt.step(losses_of(model), *rows_of_rank(batch))
        one.step(losses_of(other), *interleaved(batch, 3))
        assert_equal_on_ranks(gathered(model))
    assert error_of(model, other) < 1e-12
