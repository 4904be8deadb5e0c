"""Base optimizers that are not built as torch's own, after public ones, written anew in a few lines."""

from collections import OrderedDict, defaultdict

import torch
from torch.optim import SGD, AdamW, Optimizer


class OwnPace(Optimizer):
    """lr=None in its groups, as in transformers' Adafactor with relative_step=True."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                t = self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p.add_(p.grad, alpha=-0.1 * t**-0.5)


class SlowInside(Optimizer):
    """Lookahead as timm has it: no call of torch's constructor, the slow weights in the inner optimizer's state."""

    def __init__(self, optimizer, alpha=0.5, k=2):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.inner, self.param_groups, self.defaults = optimizer, optimizer.param_groups, optimizer.defaults
        self.defaults.update(slow_alpha=alpha, slow_k=k, slow_step=0)
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group.update(slow_alpha=alpha, slow_k=k, slow_step=0)

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for group in self.param_groups:
            group["slow_step"] += 1
            for p in group["params"] if group["slow_step"] % group["slow_k"] == 0 else ():
                slow = self.inner.state[p].setdefault("slow", p.clone())
                slow.lerp_(p, group["slow_alpha"])
                p.copy_(slow)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


class SlowOutside(Optimizer):
    """Lookahead as pytorch_optimizer has it: state dicts of a format of its own, and copies that lack attributes."""

    def __init__(self, optimizer, alpha=0.5, k=2):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.inner, self.alpha, self.k, self.state = optimizer, alpha, k, defaultdict(dict)
        for group in self.param_groups:
            group["counter"] = 0
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()
        self.defaults = {"slow_alpha": alpha, **optimizer.defaults}

    @property
    def param_groups(self):
        return self.inner.param_groups

    def __getstate__(self):
        return {"state": self.state, "inner": self.inner, "alpha": self.alpha, "k": self.k}

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for group in self.param_groups:
            group["counter"] = (group["counter"] + 1) % self.k
            for p in group["params"] if group["counter"] == 0 else ():
                p.copy_(self.state[p]["slow"].lerp_(p, self.alpha))

    def state_dict(self):
        params = [p for group in self.param_groups for p in group["params"]]
        return {"slow": {i: dict(self.state[p]) for i, p in enumerate(params)}, "inner": self.inner.state_dict()}

    def load_state_dict(self, state):
        self.inner.load_state_dict(state["inner"])
        params = [p for group in self.param_groups for p in group["params"]]
        for i, entries in state["slow"].items():
            self.state[params[i]] = {name: t.to(params[i].dtype).clone() for name, t in entries.items()}


class Chained(Optimizer):
    """Several optimizers behind one list of groups, as for Muon with AdamW, without defaults."""

    def __init__(self, *optimizers):
        self.all, self.param_groups = optimizers, [group for o in optimizers for group in o.param_groups]

    @property
    def state(self):
        return {p: entries for o in self.all for p, entries in o.state.items()}

    def step(self, closure=None):
        for optimizer in self.all:
            optimizer.step()

    def state_dict(self):
        return {"all": [optimizer.state_dict() for optimizer in self.all]}

    def load_state_dict(self, state):
        for optimizer, its in zip(self.all, state["all"], strict=True):
            optimizer.load_state_dict(its)


class ScheduleFree(SGD):
    """Schedule-free SGD: steps at y, and train() and eval() swap y for the average x."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.add_to_groups(train_mode=False, n=0)

    def add_to_groups(self, **values):
        for group in self.param_groups:
            group.update(values)

    @torch.no_grad()
    def swap(self, mode):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] is not mode else ():
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 0.1 if mode else 1 - 1 / 0.9)
        self.add_to_groups(train_mode=mode)

    def train(self):
        self.swap(True)

    def eval(self):
        self.swap(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("not in train mode")
            group["n"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                z = self.state[p]["z"]
                p.lerp_(z, 1 / group["n"]).add_(p.grad, alpha=-0.01)
                z.add_(p.grad, alpha=-group["lr"])


class Averaged(Optimizer):
    """PostLocalSGD as torch has it, on one rank: no defaults, and groups that a load leaves behind."""

    def __init__(self, optimizer):
        self.inner, self.param_groups, self.averaged = optimizer, optimizer.param_groups, 0

    @property
    def state(self):
        return self.inner.state

    def step(self, closure=None):
        self.inner.step()
        self.averaged += 1

    def state_dict(self):
        return {**self.inner.state_dict(), "step": self.averaged}

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)
        self.averaged = state_dict["step"]


def sgd(params):
    return SGD(params, lr=0.1, momentum=0.9)


def chained(params):
    some, *others = params
    return Chained(sgd([some]), AdamW(others, lr=0.01))


ODD_BASES = {
    "lr=None": OwnPace,
    "Lookahead as timm's": lambda params: SlowInside(sgd(params)),
    "Lookahead as pytorch_optimizer's": lambda params: SlowOutside(sgd(params)),
    "PostLocalSGD": lambda params: Averaged(sgd(params)),
    "several inside": chained,
    "schedule-free": ScheduleFree,
}
"""Functions of parameters."""
