"""A pass that fails on one rank: the others raise too, weights are restored on each, nobody steps."""

import itertools
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from ddp_steps import assert_equal_on_ranks, rows_of_rank, wrap
from methods import OPTIONS, WAYS
from problems import batches, losses_of, mlp
from sharding import shard
from torch.distributed.device_mesh import DeviceMesh

from fastsam import SAM
from fastsam.methods import METHODS

CELLS = [
    (name, way)
    for name, row in METHODS.items()
    for way in ("loss_fn", "closure", "contexts")
    if row.kind == "optimizer" and way in row.ways
]
SYNCS_AND_FORWARDS = list(product(("global", "replica"), ("first", "last")))
SGD = {"lr": 0.1, "momentum": 0.9}


class OwnError(Exception):
    """Rank 1's own."""


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "way", "sync", "forward"),
    [(*cell, *SYNCS_AND_FORWARDS[i % 4]) for i, cell in enumerate(CELLS)] + [("sam", "loss_fn", "replica", "last")],
)
def test_a_pass_that_fails_on_one_rank(name, way, sync, forward):
    group = dist.new_group(timeout=timedelta(seconds=30))
    model = mlp(batchnorm=True)
    ddp = wrap(model, process_group=group)
    row, batch = METHODS[name], rows_of_rank(batches(1, rows=24)[0])
    opt = row.build(ddp.parameters(), torch.optim.SGD, model=ddp, base_options=SGD, perturb_sync=sync, **OPTIONS[name])
    counted, fails_at = [], None

    def losses(x, y):
        counted.append(x)
        if dist.get_rank() == 1 and len(counted) - 1 == fails_at:
            raise OwnError
        return losses_of(ddp)(x, y)

    if forward == "last":
        # What a step takes is learned from one that goes well.
        WAYS[way](opt, losses, *batch)
    fails_at = max(len(counted) - 1, 0)
    counted.clear()
    if forward == "last" and not opt.needs_second_pass:
        fails_at = 0
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    state = [v.clone() for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    dist.barrier()
    if dist.get_rank() == 0:
        # Rank 1 is waited for no longer than that.
        dist.distributed_c10d._set_pg_timeout(timedelta(milliseconds=500), group)
    with pytest.raises(OwnError if dist.get_rank() == 1 else RuntimeError):
        WAYS[way](opt, losses, *batch)
    after = [v for s in opt.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    for t, b in zip((*model.parameters(), *model.buffers(), *after), before + state, strict=True):
        assert torch.equal(t, b)
    assert_equal_on_ranks(model.parameters())
    if way == "contexts":
        with pytest.raises(RuntimeError, match="after a failed pass; call zero_grad"):
            opt.step()
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    opt.state_dict()
    dist.barrier()


@pytest.mark.ranks(2)
def test_sharded_weights_come_back_where_one_rank_fails():
    group = dist.new_group(timeout=timedelta(seconds=30))
    model = mlp()
    # torch takes meshes of one name and the same ranks for one
    shard(model, DeviceMesh.from_group(group, "cpu", mesh_dim_names=("failing",)))
    batch, count = rows_of_rank(batches(1, rows=24)[0]), itertools.count()
    opt = SAM(model.parameters(), torch.optim.SGD, model=model, **SGD)
    before = [p.to_local().clone() for p in model.parameters()]

    def losses(x, y):
        if next(count) == 1:
            dist.barrier()
            if dist.get_rank() == 1:
                raise OwnError
            dist.distributed_c10d._set_pg_timeout(timedelta(milliseconds=500), group)
        return losses_of(model)(x, y)

    with pytest.raises(OwnError if dist.get_rank() == 1 else RuntimeError):
        opt.step(losses, *batch)
    assert next(count) == 2
    for p, b in zip(opt.param_groups[0]["params"], before, strict=True):
        assert torch.equal(p.to_local(), b)
    opt.zero_grad()
    opt.state_dict()
    dist.barrier()
