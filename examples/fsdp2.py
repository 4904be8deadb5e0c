"""FSDP2: every module that `fully_shard` has wrapped keeps its weights in shards, and so does the perturbation.

SAM needs no more than `model=`: the norm is summed over all shards, and all ranks perturb alike.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from fastsam import SAM


def main():
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    mesh = dist.init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)
    x, y = (torch.from_numpy(array).to(device) for array in load_digits(return_X_y=True))
    x = x.float() / 16

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, model=model, lr=3e-3)

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    for _ in range(5):
        # the same order on all ranks, of which each takes its part of every batch
        for rows in torch.randperm(1500).split(100):
            part = rows.chunk(mesh.size())[mesh.get_local_rank()]
            opt.step(losses, x[part], y[part])
    with torch.no_grad():
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
    if dist.get_rank() == 0:
        print(f"{mesh.size()} processes: test accuracy {accuracy:.1%}")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    dist.destroy_process_group()
    return weights


if __name__ == "__main__":
    main()
