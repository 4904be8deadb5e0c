"""SAF and MESA with several processes: every sample finds its own past, wherever it was seen."""

import pytest
import torch
import torch.distributed as dist
from ddp_steps import assert_equal_on_ranks, wrap
from problems import batches, mlp
from test_saf import Remembers
from torch.utils.data import DistributedSampler

from fastsam import MESA, SAF, SampleToRankSampler

N, C, ROWS = 22, 3, 4
X, Y = batches(1, rows=N)[0]


SETTINGS = {"lam": 1.0, "lag": 2, "start_epoch": 1, "history_dtype": torch.float64}


def plan(sampler, epochs):
    """The ids of this rank's batches, epoch by epoch."""
    for epoch in epochs:
        sampler.set_epoch(epoch)
        own = torch.tensor(list(sampler))
        yield epoch, own[: len(own) // ROWS * ROWS].split(ROWS)  # drop_last


def train(model, loss_of, sampler, epochs=range(1, 7)):
    """DDP training on this rank's samples, and the share of rows that met a past once they could."""
    ddp = wrap(model)
    opt = torch.optim.SGD(ddp.parameters(), lr=0.3, momentum=0.9)
    for epoch, parts in plan(sampler, epochs):
        loss_of.set_epoch(epoch)
        for ids in parts:
            opt.zero_grad()
            loss_of(ddp(X[ids]), Y[ids], ids).backward()
            opt.step()
    assert_equal_on_ranks(model.parameters())


def oracle(model, make_sampler, epochs=range(1, 7)):
    """One process on the batches of all ranks together, with a dictionary for a history."""
    loss_of = Remembers(SETTINGS["lam"], SETTINGS["lag"], SETTINGS["start_epoch"])
    opt = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    world = dist.get_world_size()
    plans = [list(plan(make_sampler(rank), epochs)) for rank in range(world)]
    for everybody in zip(*plans, strict=True):
        epoch = everybody[0][0]
        loss_of.set_epoch(epoch)
        for parts in zip(*(parts for _, parts in everybody), strict=True):
            ids = torch.cat(parts)
            opt.zero_grad()
            loss_of(model(X[ids]), Y[ids], ids).backward()
            opt.step()


def fixed(rank=None):
    return SampleToRankSampler(N, dist.get_world_size(), dist.get_rank() if rank is None else rank, seed=3)


def roaming(rank=None):
    rank = dist.get_rank() if rank is None else rank
    return DistributedSampler(X, dist.get_world_size(), rank, seed=3, drop_last=True)


@pytest.mark.ranks(2)
def test_saf_with_a_fixed_map_equals_one_process():
    model, other = mlp(), mlp()
    sampler = fixed()
    loss_of = SAF(N, C, sampler=sampler, **SETTINGS)
    train(model, loss_of, sampler)
    oracle(other, fixed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert loss_of._history._fields["tags"].shape == (3, 11 + 1)  # each rank keeps its part alone


@pytest.mark.ranks(2)
def test_saf_with_a_shared_directory_equals_one_process(tmp_path):
    model, other = mlp(), mlp()
    train(model, SAF(N, C, storage=tmp_path / "history", **SETTINGS), roaming())
    oracle(other, roaming)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.ranks(2)
def test_every_row_finds_its_past_where_a_history_per_process_finds_a_part(tmp_path):
    """docs/algorithms.md, R-06."""
    n, world = 400, dist.get_world_size()
    for way, at_least, at_most in (("directory", 1.0, 1.0), ("fixed", 1.0, 1.0), ("per process", 0.0, 0.6)):
        if way == "fixed":
            sampler = SampleToRankSampler(n, seed=1)
            loss_of = SAF(n, C, lag=3, start_epoch=0, lam=1.0, sampler=sampler, reduction="none")
        else:
            sampler = DistributedSampler(range(n), seed=1)
            directory = tmp_path / way
            loss_of = SAF(n, C, lag=3, start_epoch=0, lam=1.0, storage=directory, reduction="none")
            if way == "per process":  # as the authors have it
                loss_of._shared, loss_of.storage, loss_of._knows_processes = False, "device", True
        found = rows = 0
        for epoch in range(1, 7):
            sampler.set_epoch(epoch)
            loss_of.set_epoch(epoch)
            for ids in torch.tensor(list(sampler)).split(20):
                z = torch.randn(len(ids), C)
                pull = loss_of(z, Y.new_zeros(len(ids)), ids) - torch.nn.functional.cross_entropy(
                    z, Y.new_zeros(len(ids)), reduction="none"
                )
                if epoch > 3:
                    found, rows = found + int((pull > 1e-6).sum()), rows + len(ids)
        assert at_least <= found / rows <= at_most, (way, found / rows, world)


@pytest.mark.ranks(2)
def test_neither_is_an_error_that_explains_itself():
    with pytest.raises(
        RuntimeError, match=r"2 processes: .*SampleToRankSampler .*sampler=.*storage=.*DistributedSampler"
    ):
        SAF(N, C)


@pytest.mark.ranks(2)
def test_processes_that_start_after_the_loss_was_made_are_seen_in_the_first_call(tmp_path):
    ids = torch.arange(4)

    def made_before_the_group(**options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastsam.saf._world_size", lambda: 1)
            return SAF(N, C, **options)

    for options in ({}, {"storage": "host"}, {"device": "cpu"}):
        with pytest.raises(RuntimeError, match=r"2 processes: .*SampleToRankSampler"):
            made_before_the_group(**options)(torch.randn(4, C), Y[:4], ids)
    opened = made_before_the_group(storage=tmp_path / f"of rank {dist.get_rank()}", device="cpu")
    with pytest.raises(RuntimeError, match=r"has opened .* before the group of 2 processes"):
        opened(torch.randn(4, C), Y[:4], ids)
    shared = made_before_the_group(storage=tmp_path / "history")
    shared(torch.randn(4, C), Y[:4], ids)
    assert shared._shared


@pytest.mark.ranks(2)
def test_foreign_samples_are_refused():
    sampler = fixed()
    loss_of = SAF(N, C, sampler=sampler)
    foreign = (torch.arange(4) * 2 + 1 + dist.get_rank()) % N
    with pytest.raises(ValueError, match=f"does not give to rank {dist.get_rank()}"):
        loss_of(torch.randn(4, C), Y[:4], foreign)
    with pytest.raises(ValueError, match="num_samples is 5, but the sampler's is 22"):
        SAF(5, C, sampler=sampler)


@pytest.mark.ranks(2)
def test_what_rank_0_cannot_open_fails_everywhere(tmp_path):
    directory = tmp_path / "history"
    SAF(N, C, storage=directory, device="cpu")
    with pytest.raises(RuntimeError, match=r"rank 0 could not open SAF's history: FileExistsError.*resume=True"):
        SAF(N, C, storage=directory, device="cpu")
    again = SAF(N, C, storage=directory, device="cpu", resume=True)
    again.set_epoch(1)


@pytest.mark.ranks(2)
def test_directories_that_are_not_shared_fail_everywhere(tmp_path):
    mine = tmp_path / f"of rank {dist.get_rank()}" / "history"
    with pytest.raises(RuntimeError, match="ranks 1 do not see rank 0's"):
        SAF(N, C, storage=mine, device="cpu")


@pytest.mark.ranks(2)
def test_mesa_averages_alike_on_all_ranks():
    model = mlp(batchnorm=True)
    ddp = wrap(model)
    mesa = MESA(ddp, decay=0.9, start_epoch=0)
    opt = torch.optim.SGD(ddp.parameters(), lr=0.3)
    mesa.attach(opt)
    part = slice(dist.get_rank(), None, dist.get_world_size())
    for x, y in batches(4):
        opt.zero_grad()
        mesa(ddp(x[part]), y[part], x[part]).backward()
        opt.step()
    assert type(mesa.teacher) is type(model)
    assert_equal_on_ranks(model.parameters())
    assert_equal_on_ranks(mesa.teacher.parameters())
