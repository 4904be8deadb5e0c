"""A model that moves all kinds of state in its forward."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class OwnNorm(nn.Module):
    """Batch norm as many repositories write it: no subclass of torch's."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1)


class Codebook(nn.Module):
    """Vector quantization with averages that each forward moves in place, whose counts have an odd size."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("codes", torch.randn(5, width))
        self.register_buffer("used", torch.zeros(5, dtype=torch.uint8))

    def forward(self, h):
        code = torch.cdist(h, self.codes).argmin(1)
        quantized = self.codes[code]
        if self.training:
            with torch.no_grad():
                hot = F.one_hot(code, 5).to(h.dtype)
                self.codes.lerp_((hot.T @ h) / hot.sum(0).clamp(min=1)[:, None], 0.2)
                self.used.add_(hot.sum(0).to(torch.uint8))
        return h + (quantized - h).detach()


class Queue(nn.Module):
    """Keys of earlier batches in a buffer that is replaced, by an encoder that follows the trained one."""

    def __init__(self, query):
        super().__init__()
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.register_buffer("keys", torch.randn(4, query.out_features))
        self.register_buffer("newest", None)

    def forward(self, query, x, h):
        if self.training:
            with torch.no_grad():
                for k, q in zip(self.key.parameters(), query.parameters(), strict=True):
                    k.data = k.data * 0.5 + q.data * 0.5
                self.newest = self.key(x)[:2]
                self.keys = torch.cat([self.keys, self.newest])[-20:]
        return h @ self.keys.T / len(self.keys)


class Counted:
    """An object with a state that is no module."""

    def __init__(self):
        self.calls = 0

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Moving(nn.Module):
    """Takes [n, 6], returns [n, 3], and notes its state before and after every forward in training mode."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(2)
        self.query = nn.Linear(6, 8, bias=False)
        self.norms = nn.Sequential(nn.BatchNorm1d(8), OwnNorm(8))
        self.instance = nn.InstanceNorm1d(2, track_running_stats=True)
        self.codebook, self.queue = Codebook(8), Queue(self.query)
        self.observer = torch.ao.quantization.MovingAverageMinMaxObserver()
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3, bias=False))
        self.to(dtype)
        self.aside, self.counted = torch.zeros(3, dtype=dtype), Counted()
        self.before, self.after = [], []

    def forward(self, x):
        if not self.training:
            return self.head(self.query(x))
        self.before.append(self.now())
        x = self.instance(x.unflatten(1, (2, 3))).flatten(1)
        h = self.norms(self.query(x))
        h = self.codebook(h)
        z = self.head(torch.tanh(h)) + self.queue(self.query, x, h).sum(1, keepdim=True).tanh() * self.aside.sum()
        self.observer(z.detach())
        z = z * (1 + self.observer.max_val.to(z.dtype)) + self.counted.calls
        self.aside += z.detach().mean(0)
        self.counted.calls += 1
        self.after.append(self.now())
        return z

    @property
    def kept(self):
        """What `keep=` takes."""
        return [self.aside, self.counted]

    def now(self):
        """Copies of all state by name."""
        buffers = {name: b.clone() for name, b in self.named_buffers() if b is not None}
        frozen = {name: p.detach().clone() for name, p in self.queue.key.named_parameters(prefix="queue.key")}
        return buffers | frozen | {"aside": self.aside.clone(), "calls": torch.tensor(self.counted.calls)}


def differences(some, other, leave_out=()):
    """The names of what differs, without those that hold one of these words."""
    names = {n for n in some.keys() | other.keys() if not any(word in n for word in leave_out)}
    return sorted(n for n in names if n not in some or n not in other or not torch.equal(some[n], other[n]))
