"""MESA: one pass a step and a forward of the teacher, a moving average of the model that the loss compares it with.

`attach` moves the average after every step of an optimizer; the teacher is a plain module that can be evaluated too.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastsam import MESA


def main():
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x = x.float() / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    mesa = MESA(model, lam=0.8, decay=0.98, start_epoch=2)
    mesa.attach(opt)

    for epoch in range(1, 6):
        mesa.set_epoch(epoch)
        for rows in torch.randperm(1500).split(100):
            opt.zero_grad()
            mesa(model(x[rows]), y[rows], x[rows]).backward()
            opt.step()
    model.eval()
    with torch.no_grad():
        own, average = ((net(x[1500:]).argmax(1) == y[1500:]).float().mean() for net in (model, mesa.teacher))
    print(f"test accuracy: model {own:.1%}, its average {average:.1%}")
    return model, mesa.teacher


if __name__ == "__main__":
    main()
