"""Loops written by hand in plain torch, which what a framework trains is held against."""

import copy

import torch
from methods import ORACLES, Step
from problems import batches, losses_of
from torch.optim.lr_scheduler import LambdaLR

from fastsam import ESAM, GSAM, MESA, MSAM, SAF, SAM, LookSAM
from fastsam.methods import METHODS as TABLE

METHODS = {
    "sam": (SAM, {"rho": 0.1}),
    "esam": (ESAM, {"rho": 0.1, "seed": 4}),
    "msam": (MSAM, {"rho": 0.1, "num_shards": 3}),
    "gsam": (GSAM, {"rho": 0.1}),
    "looksam": (LookSAM, {"rho": 0.1, "k": 2}),
}
"""What the frameworks' tests train with."""

SGD = {"lr": 0.1, "momentum": 0.9}


def decay(step):
    """Of the learning rate."""
    return 1 - step / 20


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
        self.options = {**TABLE[row].options, **TABLE[row].fixed, **options, "way": "loss_fn"}
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

    def train(self, data, schedule, accumulated=1, **clip):
        """Take a step for each batch, or for each so many of them together, and of the schedule."""
        for i in range(0, len(data), accumulated):
            gradients = [self.gradient(*batch) for batch in data[i : i + accumulated]]
            self.step(*(halved(g, accumulated) for g in gradients), **clip)
            schedule.step()
        return self

    def assert_equals(self, model, tolerance=1e-6, buffers=False):
        for (name, p), q in zip(self.model.named_parameters(), model.parameters(), strict=True):
            difference = (p - q).abs().max().item()
            assert difference <= tolerance, f"{name} differs by {difference}"
        if buffers:
            for some, other in zip(model.buffers(), self.model.buffers(), strict=True):
                torch.testing.assert_close(some, other)


def by_hand(name, model, losses_of=losses_of, options=None):
    """Return a loop for a copy of a model, with SGD, and its schedule.

    Args:
        name: of METHODS.
        model: the one that the framework trains.
        losses_of: function of a model that returns its losses.
        options: of the method, in place of those of METHODS.
    """
    own = METHODS[name][1] if options is None else options
    loop = ByHand(name, copy.deepcopy(model), None, torch.optim.SGD, own, **SGD)
    loop.losses = losses_of(loop.model)
    return loop, LambdaLR(loop.base, decay)


def by_plain_steps(name, model, logits, data, schedules=decay):
    """Train a copy of a model in bfloat16 by `opt.step` in a plain loop, and return it.

    A loop by hand cannot tell more there: where it perturbs a weight to another last bit, the weight may be rounded to
    another one of 8 bits.

    Args:
        name: of METHODS.
        model: the model, which is left as it is.
        logits: function of a model and the inputs of a batch, which runs under autocast.
        data: batches of inputs and classes.
        schedules: function of the step that the learning rate is multiplied by.
    """
    model = copy.deepcopy(model)
    cls, options = METHODS[name]
    opt = cls(model.parameters(), torch.optim.SGD, model=model, **options, **SGD)
    schedule = LambdaLR(opt, schedules)

    def losses(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            z = logits(model, x)
        return torch.nn.functional.cross_entropy(z.float(), y, reduction="none")

    for batch in data:
        opt.step(losses, *batch)
        opt.zero_grad()
        schedule.step()
    return model


def assert_same_weights(some, other):
    """They differ by no more than 1e-6."""
    for p, q in zip(some.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


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


class Past:
    """SAF or MESA as the loss of a training, and by hand; small batches, four epochs of two.

    Args:
        past: "saf" or "mesa".
        inside: "sam" or "sgd", the optimizer.
        model: that is trained.
        logits: function of a model and inputs.
        **options: of the loss.
    """

    def __init__(self, past, inside, model, logits=lambda model, x: model(x), samples=24, **options):
        self.past, self.logits, self.epoch = past, logits, 1
        if past == "saf":
            self.loss = SAF(num_samples=samples, num_classes=3, lam=1.0, lag=1, start_epoch=1, **options)
        else:
            self.loss = MESA(model, lam=1.0, decay=0.9, start_epoch=1, **options)
        own = {"rho": 0.1} if inside == "sam" else {}
        self.hand = ByHand(inside, copy.deepcopy(model), self._losses, torch.optim.SGD, own, **SGD)
        self.oracle = ORACLES[past](self.hand.model, {"lam": 1.0, "lag": 1, "start_epoch": 1, "decay": 0.9})

    def _losses(self, x, y, ids):
        z = self.logits(self.hand.model, x)
        self._seen.append(z.detach())
        return self.oracle.losses(z, x, y, ids, self.epoch)

    def train_by_hand(self, data, epochs=4):
        """Train on batches of inputs, classes and ids, in the order of the ids."""
        for self.epoch in range(1, epochs + 1):
            recorded = []
            for x, y, ids in data:
                self._seen = []
                self.hand.step(self.hand.gradient(x, y, ids))
                if self.past == "mesa":
                    self.oracle.after_step(self._seen[0], ids, self.epoch)
                recorded.append(self._seen[0].half().double())
            if self.past == "saf":
                self.oracle.records[self.epoch] = torch.cat(recorded)
        return self.hand


PAST_DATA = [(*batch, torch.arange(12) + 12 * i) for i, batch in enumerate(batches(2, dtype=torch.float32))]


def train_trajectory(past, inside, model, prepare, data=PAST_DATA):
    """Train with SAF or MESA, and return the loop by hand that has done the same.

    Args:
        past, inside, model: as for `Past`.
        prepare: function of the optimizer that returns how a step is taken: a function of losses and a batch.
        data: batches of inputs, classes and ids, in the order of the ids.
    """
    both = Past(past, inside, model, samples=sum(len(ids) for _, _, ids in data))
    cls, own = (SAM, {"rho": 0.1, "model": model}) if inside == "sam" else (None, {})
    params = model.parameters()
    opt = torch.optim.SGD(params, **SGD) if cls is None else cls(params, torch.optim.SGD, **own, **SGD)
    if past == "mesa":
        both.loss.attach(opt)
    step = prepare(opt)

    def loss(x, y, ids):
        return both.loss(model(x), y, ids if past == "saf" else x)

    for epoch in range(1, 5):
        both.loss.set_epoch(epoch)
        for batch in data:
            step(loss, *batch)
    return both.train_by_hand(data)
