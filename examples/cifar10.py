"""SAM around SGD, on CIFAR-10 or, where no directory is given, on scikit-learn's handwritten digits.

The loop is a plain one but for three lines: the optimizer, a loss for each row, and one call that runs both passes.

    python examples/cifar10.py [DIRECTORY [EPOCHS]]  # of data_batch_1.bin and the like, from cifar-10-binary.tar.gz
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fastsam import SAM


def read(*files):
    # a record is a label and three planes of 32 x 32 pixels, all bytes
    records = torch.frombuffer(bytearray().join(file.read_bytes() for file in files), dtype=torch.uint8).view(-1, 3073)
    return records[:, 1:].view(-1, 3, 32, 32).float().div_(255), records[:, 0].long()


def load(directory):
    if directory is not None:
        return *read(*sorted(Path(directory).glob("data_batch_*.bin"))), *read(Path(directory) / "test_batch.bin")
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x = x.float().div_(16).view(-1, 1, 8, 8)
    return x[:1500], y[:1500], x[1500:], y[1500:]


def main(directory=None, epochs=3):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, test_x, test_y = (tensor.to(device) for tensor in load(directory))
    sizes = (x.shape[1], 32, 1), (32, 64, 2), (64, 128, 2)
    body = [m for i, o, s in sizes for m in (nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10)).to(device)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, int(epochs))

    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none", label_smoothing=0.1)

    for epoch in range(int(epochs)):
        model.train()
        for rows in torch.randperm(len(x)).split(128):
            loss = opt.step(losses, x[rows], y[rows])
        schedule.step()
        model.eval()
        with torch.no_grad():
            accuracy = torch.cat([model(part).argmax(1) for part in test_x.split(512)]).eq(test_y).float().mean()
        print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
