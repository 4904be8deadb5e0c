"""SAF: one pass a step, as in a plain loop; the loss compares each sample with the model's outputs of three epochs ago.

It has to know which sample a row is, which `IndexedDataset` says, and which epoch it is, which `set_epoch` says.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastsam import SAF, IndexedDataset


def main():
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x = x.float() / 16
    train_set = TensorDataset(x[:1500], y[:1500])
    loader = DataLoader(IndexedDataset(train_set), batch_size=100, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saf = SAF(num_samples=len(train_set), num_classes=10, lam=0.3, lag=3, start_epoch=5)

    for epoch in range(1, 11):
        saf.set_epoch(epoch)
        for x_, y_, ids in loader:
            opt.zero_grad()
            loss = saf(model(x_), y_, ids)
            loss.backward()
            opt.step()
    with torch.no_grad():
        accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
    print(f"last loss {loss:.3f}, test accuracy {accuracy:.1%}, records of {saf.memory_bytes / 1000:.0f} kB")
    return model


if __name__ == "__main__":
    main()
