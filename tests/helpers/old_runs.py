"""Small runs of every method, whose checkpoints must go on to resume: `python tests/old_runs.py FILE` writes them.

The file that the tests read was written before fastsam/ was cut into rooms. A run is three steps, a checkpoint, and
three more; the file holds the checkpoint and the weights at the end.
"""

import sys

import torch
import torch.nn.functional as F
from torch.optim import SGD, AdamW

from fastsam import ESAM, MESA, MSAM, SAF, SAM

STEPS = 3
RUNS = {
    "sam": lambda m: SAM(m.parameters(), SGD, rho=0.1, model=m, lr=0.1, momentum=0.9),
    "sam adamw": lambda m: SAM(m.parameters(), AdamW, rho=0.1, model=m, lr=0.01),
    "asam": lambda m: SAM(m.parameters(), SGD, rho=0.5, adaptive=True, model=m, lr=0.1, momentum=0.9),
    "asam official": lambda m: SAM(m.parameters(), SGD, rho=0.5, adaptive="official", model=m, lr=0.1, momentum=0.9),
    "esam": lambda m: ESAM(m.parameters(), SGD, rho=0.1, model=m, seed=3, lr=0.1, momentum=0.9),
    "esam element": lambda m: ESAM(m.parameters(), AdamW, rho=0.1, mask="element", model=m, seed=4, lr=0.01),
    "msam": lambda m: MSAM(m.parameters(), SGD, rho=0.1, num_shards=4, model=m, lr=0.1, momentum=0.9),
    "saf": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "mesa": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9),
    "saf sam": lambda m: SAM(m.parameters(), SGD, rho=0.1, model=m, lr=0.1, momentum=0.9),
}


class Run:
    """A model, its optimizer and its loss; an epoch is one batch of 12 rows."""

    def __init__(self, name):
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        ).double()
        self.opt = RUNS[name](self.model)
        self.loss = None
        if "saf" in name:
            self.loss = SAF(12, 3, lag=2, start_epoch=2, reduction="none", history_dtype=torch.float32)
        if name == "mesa":
            self.loss = MESA(self.model, decay=0.9, start_epoch=1, reduction="none")
            self.loss.attach(self.opt)
        self.taken = 0

    def losses(self, x, y, ids):
        z = self.model(x)
        if self.loss is None:
            return F.cross_entropy(z, y, reduction="none")
        return self.loss(z, y, x if isinstance(self.loss, MESA) else ids)

    def train(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (12,), generator=generator)
        for _ in range(STEPS):
            self.taken += 1
            if self.loss is not None:
                self.loss.set_epoch(self.taken)
            if hasattr(self.opt, "base_optimizer"):
                self.opt.step(self.losses, x, y, torch.arange(12))
            else:
                self.opt.zero_grad()
                self.losses(x, y, torch.arange(12)).mean().backward()
                self.opt.step()

    def state(self):
        parts = {"model": self.model, "opt": self.opt, "loss": self.loss}
        return {key: part.state_dict() for key, part in parts.items() if part is not None} | {"taken": self.taken}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        if self.loss is not None:
            self.loss.load_state_dict(state["loss"])
        self.taken = state["taken"]


def written(name):
    """What the file says of one run."""
    run = Run(name)
    run.train()
    buffer = {key: _copied(value) for key, value in run.state().items()}
    run.train()
    return {"checkpoint": buffer, "after": {k: v.clone() for k, v in run.model.state_dict().items()}}


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    processor = torch.backends.cpu.get_cpu_capability()
    torch.save({"processor": processor, "runs": {name: written(name) for name in RUNS}}, sys.argv[1])
