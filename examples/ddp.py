"""DistributedDataParallel: the wrapper is passed as `model=`, and the rest of the loop stays as it is.

All ranks perturb along the gradient of the whole batch, so the weights are those of one process with all rows; with
perturb_sync="replica" each would perturb along its own, and one of two reductions would go away.

    torchrun --nproc-per-node 2 examples/ddp.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fastsam import SAM


def main():
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x = x.float() / 16
    train_set = TensorDataset(x[:1500], y[:1500])
    sampler = DistributedSampler(train_set)
    loader = DataLoader(train_set, batch_size=50, sampler=sampler)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    parallel = DistributedDataParallel(model, device_ids=[device.index] if on_gpus else None)
    opt = SAM(parallel.parameters(), torch.optim.SGD, rho=0.05, model=parallel, lr=0.1, momentum=0.9)

    def losses(x, y):
        return F.cross_entropy(parallel(x), y, reduction="none")

    for epoch in range(5):
        sampler.set_epoch(epoch)
        for x_, y_ in loader:
            opt.step(losses, x_.to(device), y_.to(device))
    if dist.get_rank() == 0:
        accuracy = (model(x[1500:].to(device)).argmax(1).cpu() == y[1500:]).float().mean()
        print(f"{dist.get_world_size()} processes: test accuracy {accuracy:.1%}")
    dist.destroy_process_group()
    return model.state_dict()


if __name__ == "__main__":
    main()
