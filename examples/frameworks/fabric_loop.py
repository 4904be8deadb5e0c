"""Lightning's Fabric: `opt.backward` with `fabric.backward`, for every method; with accumulation and clipping."""

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn

from fastsam import ESAM

ACCUMULATED = 2


def main():
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, opt = fabric.setup(model, ESAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9))
    # the wrapper comes later than the optimizer
    opt.bind(model)

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def backward(loss):
        fabric.backward(loss / ACCUMULATED)

    for i, rows in enumerate(torch.arange(1500).split(50)):
        is_last = (i + 1) % ACCUMULATED == 0
        with fabric.no_backward_sync(model, enabled=fabric.world_size > 1 and not is_last):
            loss = opt.backward(losses, x[rows], y[rows], backward=backward)
        if is_last:
            fabric.clip_gradients(model, opt, max_norm=1.0)
            opt.step()
            opt.zero_grad()
    fabric.print(f"last loss {loss:.3f}")
    return model.module


if __name__ == "__main__":
    main()
