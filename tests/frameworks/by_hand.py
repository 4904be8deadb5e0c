"""Loops written by hand in plain torch, which what a framework trains is held against."""

import torch
from methods import ORACLES, Step

from fastsam.methods import METHODS


class ByHand:
    """A method's step by its oracle and a base optimizer: gradients of micro-batches, then clip, then step.

    Args:
        row: of fastsam.methods.METHODS, of kind "optimizer".
        model: a copy of the one that the framework trains.
        losses: function of a batch that returns a loss for each row.
        base: class of the base optimizer.
        options: of the method, in place of its defaults.
        **base_options: of the base optimizer.
    """

    def __init__(self, row, model, losses, base, options, **base_options):
        self.oracle, self.model, self.losses = ORACLES[row], model, losses
        self.options = {**METHODS[row].options, **METHODS[row].fixed, **options, "way": "loss_fn"}
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.base = base(self.params, **base_options)
        self.perturbations, self.memory, self.first = 0, {}, []

    def gradient(self, *batch):
        """Return the method's gradient of a batch; the first pass's mean loss goes to `first`."""
        model = _Trained(self.model, self.params)
        step = Step(model, self.losses, batch, self.options, self.perturbations, self.memory)
        gradient = self.oracle(step)
        self.perturbations += 1
        self.first.append(torch.cat(step.seen).mean().item())
        return gradient

    def step(self, *gradients, clip=None, clip_value=None):
        """Take the base's step with the sum of some gradients."""
        for p, *parts in zip(self.params, *gradients, strict=True):
            p.grad = sum(parts)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, clip)
        if clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.params, clip_value)
        self.base.step()
        self.base.zero_grad()

    def assert_equals(self, model, tolerance=1e-6):
        for (name, p), q in zip(self.model.named_parameters(), model.parameters(), strict=True):
            difference = (p - q).abs().max().item()
            assert difference <= tolerance, f"{name} differs by {difference}"


class _Trained:
    """A model whose parameters are those that are trained."""

    def __init__(self, model, params):
        self._model, self._params = model, params

    def parameters(self):
        return self._params

    def buffers(self):
        return self._model.buffers()

    def named_parameters(self):
        names = {id(p): name for name, p in self._model.named_parameters()}
        return [(names[id(p)], p) for p in self._params]


def halved(gradient, parts=2):
    """A part's share of an accumulated gradient."""
    return [g / parts for g in gradient]
