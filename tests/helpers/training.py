"""Training in a cell: the library's side, and beside it the oracle's."""

import copy
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from methods import ALL_BASES, OPTIONS, ORACLES, VARIANT_OPTIONS, WAYS, Step, plain
from problems import batches, mlp

from fastsam.methods import METHODS

ROWS, CLASSES, STEPS = 14, 3, 6
"""Rows of a batch, which make unequal shards; classes; how many steps show everything that a method does."""


@cache
def data(dtype):
    return batches(2 * STEPS, rows=ROWS, dtype=dtype)


def options_of(row, variant):
    """Keywords of a constructor."""
    return {**OPTIONS[row], **METHODS[row].variants[variant].options, **VARIANT_OPTIONS.get((row, variant), {})}


class Training:
    """A model, the optimizer of a cell and its loss; each step has its own batch and learning rate, and is an epoch.

    Args:
        cell: what is trained.
        dtype: of the model.
        dropout: its probability.
        model: in place of a small net with batch norm.
        steps_per_epoch: how many batches of other samples make an epoch.
        groups: function of the model that returns parameter groups; one group of all by default.
        options: keywords in place of the cell's, for the optimizer.
    """

    def __init__(self, cell, dtype=torch.float64, dropout=0.0, model=None, groups=None, steps_per_epoch=1, **options):
        self.cell, self.dtype, self.steps_per_epoch, self.taken = cell, dtype, steps_per_epoch, 0
        self.model = model or mlp(dtype, batchnorm=True, dropout=dropout)
        subject, (base, base_options) = cell.subject, ALL_BASES[cell.base]
        params = groups(self.model) if groups else self.model.parameters()
        self.opt, self.loss = None, None
        if subject.optimizer is None:
            self.opt = base(params, **base_options)
        else:
            row = METHODS[subject.optimizer]
            own = {**options_of(subject.optimizer, subject.variant), **options}
            row = row if cell.cls is None else replace(row, cls=cell.cls)
            self.opt = row.build(params, base, model=self.model, base_options=base_options, **own)
        if subject.loss is not None:
            sizes = {"num_samples": ROWS * steps_per_epoch, "num_classes": CLASSES}
            given = options_of(subject.loss, subject.variant)
            self.loss = METHODS[subject.loss].build_loss(model=self.model, reduction="none", **sizes, **given)
        self.attach()
        self.lrs = [group["lr"] for group in self.opt.param_groups]

    def attach(self):
        """Let a loss with an average of the weights follow the optimizer; a copy of the training does so by itself."""
        if hasattr(self.loss, "attach"):
            self.loss.attach(self.opt)

    def losses(self, x, y, ids):
        z = self.model(x)
        if self.loss is None:
            return F.cross_entropy(z, y, reduction="none")
        given = {"sample_ids": ids, "inputs": x}
        return self.loss(z, y, *(given[need] for need in METHODS[self.cell.subject.loss].loss_needs))

    @property
    def batch(self):
        """Of the next step."""
        part = self.taken % self.steps_per_epoch
        return *data(self.dtype)[self.taken % len(data(self.dtype))], torch.arange(ROWS) + part * ROWS

    def begin(self):
        """What the next step is about to find: its epoch, and its learning rates."""
        if self.loss is not None:
            self.loss.set_epoch(self.taken // self.steps_per_epoch + 1)
        for group, lr in zip(self.opt.param_groups, self.lrs, strict=True):
            group["lr"] = lr * (1 - self.taken / 20)

    def step(self, losses=None):
        """Take a step in the cell's way, and return what it returns."""
        self.begin()
        returned = WAYS[self.cell.way](self.opt, losses or self.losses, *self.batch)
        self.taken += 1
        return returned

    def train(self, steps=STEPS):
        for _ in range(steps):
            self.step()
        return self

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def state(self):
        """A checkpoint."""
        parts = {"model": self.model, "opt": self.opt, "loss": self.loss}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return copy.deepcopy(state) | {"taken": self.taken, "draws": torch.get_rng_state()}

    def load(self, state):
        """Go on from a checkpoint."""
        state = copy.deepcopy(state)
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        if self.loss is not None:
            self.loss.load_state_dict(state["loss"])
        self.taken = state["taken"]
        torch.set_rng_state(state["draws"])
        return self


def moments(training):
    """Copies of the optimizer's state, by parameter and name."""
    state = training.opt.state_dict()["state"]
    return {f"{i} {name}": t.clone() for i, entries in state.items() for name, t in entries.items()}


class Truth:
    """The same training by the oracles, in plain torch and float64."""

    def __init__(self, cell, model=None):
        subject, (base, base_options) = cell.subject, ALL_BASES[cell.base]
        self.model, self.taken, self.memory = model or mlp(batchnorm=True), 0, {}
        self.base, self.lr = base(self.model.parameters(), **base_options), base_options["lr"]
        self.oracle = ORACLES[subject.optimizer] if subject.optimizer else plain
        row = METHODS[subject.row]
        self.options = {**row.options, **row.fixed, **options_of(subject.row, subject.variant), "way": cell.way}
        self.past = ORACLES[subject.loss](self.model, self.options) if subject.loss else None
        if subject.inside:
            self.options = {**METHODS[subject.inside].options, **OPTIONS[subject.inside]}

    def losses(self, x, y, ids):
        z = self.model(x)
        self.first = z.detach() if self.first is None else self.first
        if self.past is None:
            return F.cross_entropy(z, y, reduction="none")
        return self.past.losses(z, x, y, ids, self.taken + 1)

    def step(self):
        """Take a step and return the mean loss at w."""
        batch, self.first = (*data(torch.float64)[self.taken], torch.arange(ROWS)), None
        lr = self.base.param_groups[0]["lr"] = self.lr * (1 - self.taken / 20)
        step = Step(self.model, self.losses, batch, {**self.options, "lr": lr}, self.taken, self.memory)
        for p, d_n in zip(self.model.parameters(), self.oracle(step), strict=True):
            p.grad = d_n
        self.base.step()
        if self.past is not None:
            self.past.after_step(self.first, batch[2], self.taken + 1)
        self.taken += 1
        return torch.cat(step.seen).mean()
