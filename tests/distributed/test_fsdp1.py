"""FSDP1's shards do not say how they lie on the ranks: refused, with the way out, whenever the model was wrapped."""

import warnings

import pytest
import torch
from methods import by_contexts, by_loss_function, by_two_steps
from problems import batches, losses_of, mlp
from torch.distributed.fsdp import FullyShardedDataParallel

from fastsam import ESAM, MSAM, SAM

MATCH = r"sharded by FullyShardedDataParallel \(FSDP1\).*use torch.distributed.fsdp.fully_shard"


def flattened(model, use_orig_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("cls", [SAM, ESAM, MSAM])
def test_the_constructor_refuses(cls, use_orig_params):
    model = flattened(mlp(), use_orig_params)
    shards = {"num_shards": 2} if cls is MSAM else {}
    for keywords in ({}, {"model": model}):
        with pytest.raises(ValueError, match=MATCH):
            cls(model.parameters(), torch.optim.SGD, lr=0.1, **shards, **keywords)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", [by_loss_function, by_contexts, by_two_steps])
def test_the_first_step_refuses_a_model_that_was_wrapped_later(way):
    model = mlp()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    wrapped = flattened(model, use_orig_params=True)
    with pytest.raises(ValueError, match=MATCH):
        way(opt, losses_of(wrapped), *batches(1)[0])
