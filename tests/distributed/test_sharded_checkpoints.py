"""A checkpoint of torch.distributed.checkpoint goes on with another number of processes."""

import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ddp_steps import EXACT, rows_of_rank
from problems import batches, largest_difference, losses_of, mlp
from sharding import ADAMW, error_of, shard
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fastsam import ESAM


def ignoring_one_process(function):
    def quietly(*args, **options):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            return function(*args, **options)

    return quietly


def train(model, opt, data, pick=lambda batch: batch):
    for batch in data:
        opt.step(losses_of(model), *pick(batch))


def optimizer_of(model):
    return ESAM(model.parameters(), torch.optim.AdamW, 0.1, beta=0.5, gamma=1.0, **ADAMW)


@ignoring_one_process
def save(model, opt, folder, **options):
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, **options)


@ignoring_one_process
def load(model, opt, folder, **options):
    weights, state = get_state_dict(model, opt)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, **options)
    set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=state)


def whole_run():
    """Six steps on one process, without a checkpoint."""
    model = mlp()
    train(model, optimizer_of(model), batches(6))
    return model


@pytest.fixture
def folder_of_one_process(tmp_path):
    model = mlp()
    opt = optimizer_of(model)
    train(model, opt, batches(6)[:3])
    save(model, opt, tmp_path / "checkpoint", no_dist=True)
    return tmp_path / "checkpoint"


@pytest.mark.ranks(2)
def test_checkpoint_of_one_process_continues_on_two(folder_of_one_process):
    model = mlp(seed=5)
    shard(model)
    opt = optimizer_of(model)
    load(model, opt, folder_of_one_process)
    train(model, opt, batches(6)[3:], rows_of_rank)
    assert error_of(model, whole_run()) < EXACT


def save_from_two_processes(folder):
    model = mlp()
    shard(model)
    opt = optimizer_of(model)
    train(model, opt, batches(6)[:3], rows_of_rank)
    save(model, opt, folder)
    train(model, opt, batches(6)[3:], rows_of_rank)
    assert error_of(model, whole_run()) < EXACT


@pytest.mark.xdist_group("ranks")
def test_checkpoint_of_two_processes_continues_on_one(ranks_of, tmp_path):
    assert ranks_of(2).call(save_from_two_processes, folder=tmp_path) == {0: None, 1: None}
    model = mlp()
    opt = optimizer_of(model)
    load(model, opt, tmp_path, no_dist=True)
    train(model, opt, batches(6)[3:])
    assert largest_difference(model, whole_run()) < EXACT
