"""Models with sharded weights: fully_shard (FSDP2) and tensor parallel layers."""

from functools import partial

import torch
import torch.distributed as dist
from ddp_steps import EXACT, SGD, assert_equal_on_ranks, mean_loss, rows_of_rank
from oracle import sam_step
from problems import batches, mlp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastsam import SAM

ADAMW = {"lr": 0.01, "weight_decay": 0.1}
BASES = {
    "sgd": (torch.optim.SGD, SGD),
    "adamw": (torch.optim.AdamW, ADAMW),
    "amsgrad foreach": (torch.optim.AdamW, {**ADAMW, "amsgrad": True, "foreach": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def mesh_of(*sizes, names=("shard",)):
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


def shard(model, mesh=None, **options):
    mesh = mesh or mesh_of()
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model, mesh):
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def gathered(model):
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def error_of(model, expected):
    return max((p - q).abs().max().item() for p, q in zip(gathered(model), expected.parameters(), strict=True))


def train_and_compare(way, base="sgd", adaptive=False, mesh=None, prepare=shard, steps=5, **options):
    cls, keywords = BASES[base]
    expected, model = mlp(), mlp()
    base_opt = cls(expected.parameters(), **keywords)
    prepare(model, mesh, **options)
    opt = SAM(model.parameters(), cls, 0.1, adaptive, model=model, **keywords)
    for x, y in batches(steps):
        mine = rows_of_rank((x, y)) if prepare is shard else (x, y)
        way(opt, model, *mine)
        sam_step(expected, partial(mean_loss, expected, x, y), base_opt, 0.1, adaptive)
        assert_equal_on_ranks(gathered(model))
    error = error_of(model, expected)
    assert error < EXACT, error
    assert error_of(model, mlp()) > 1e-2, "nothing was trained"
    return model
