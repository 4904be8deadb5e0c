"""Small models and batches for the tests."""

import torch
import torch.nn.functional as F
from torch import nn


def mlp(dtype=torch.float64, batchnorm=False, dropout=0.0, seed=1):
    # no bias before batch norm: its true gradient is 0, and Adam would turn rounding noise into steps
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8, bias=not batchnorm)]
    layers += [nn.BatchNorm1d(8)] if batchnorm else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(8, 3)).to(dtype)


def cnn(dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).to(dtype)


def batches(n=10, rows=12, features=6, classes=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, features, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, classes, (rows,), generator=generator),
        )
        for _ in range(n)
    ]


def losses_of(model):
    def losses(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    return losses


def snapshot(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same(model, expected, what=""):
    for name, t in model.state_dict().items():
        assert torch.equal(t, expected[name]), f"{what} {name} differs by {(t - expected[name]).abs().max()}"


def largest_difference(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((s.double() - t.double()).abs().max().item() for s, t in pairs)


class Quadratic(nn.Module):
    """L(w) = w'Aw/2 - b'w of docs/algorithms.md, split over two tensors so that norms must be global."""

    def __init__(self):
        super().__init__()
        self.a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        self.b = torch.tensor([1.0, -1.0], dtype=torch.float64)
        self.u = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def forward(self):
        w = torch.cat([self.u, self.v])
        return w @ self.a @ w / 2 - self.b @ w

    @property
    def w(self):
        return torch.cat([self.u, self.v]).detach()

    @property
    def grad(self):
        return torch.cat([self.u.grad, self.v.grad])
