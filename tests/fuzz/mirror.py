"""What the state machine of the call orders is held against: every call once more, in plain torch.

A mirror has a model, a base optimizer and random numbers of its own, and perturbs, combines and restores with the few
lines of tests/methods.py. It knows which calls are legal when, which is the specification of the orders.
"""

import copy

import torch
import torch.nn.functional as F
from methods import BASES, dot, gsam_gradient, looksam_gradient, looksam_vector, radial
from problems import batches, mlp
from torch import nn

from fastsam.kernels import philox

IDLE, ASCENT, ASCENDED, DESCENT, FIRST = "idle", "ascent", "ascended", "descent", "first"
DATA = batches(3, rows=6)


class InTurn:
    """Perturbs not at all, in full and by half, in turn."""

    def scale(self, step):
        return (0.0, 1.0, 0.5)[step % 3]


METHODS_AND_OPTIONS = {
    "sam": ("sam", {"rho": 0.1}),
    "asam": ("asam", {"rho": 0.5}),
    "esam": ("esam", {"rho": 0.1, "beta": 0.6, "gamma": 0.5, "seed": 4}),
    "esam, no selection": ("esam", {"rho": 0.1, "beta": 0.6, "gamma": 1.0, "seed": 4}),
    "msam": ("msam", {"rho": 0.1, "num_shards": 2, "bn_update": "sequential"}),
    "gsam": ("gsam", {"rho": 0.1, "alpha": 0.4}),
    "looksam": ("looksam", {"rho": 0.1, "k": 2, "alpha": 0.7}),
}
METHODS_AND_OPTIONS |= {
    f"{method}, scheduled": (row, {**options, "when": InTurn()})
    for method, (row, options) in METHODS_AND_OPTIONS.items()
    if method not in ("asam", "esam")
}


class Net(nn.Module):
    """Batch norm, dropout, and a parameter that the optimizer gets later."""

    def __init__(self):
        super().__init__()
        self.body = mlp(batchnorm=True, dropout=0.3)
        self.shift = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        return self.body(x) + self.shift


def losses_of(model):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


class Mirror:
    """The truth about one training.

    Args:
        method: one of METHODS_AND_OPTIONS.
        base: one of BASES.
        draws: state of torch's generator.
    """

    def __init__(self, method, base, draws):
        self.row, self.options = METHODS_AND_OPTIONS[method][0], dict(METHODS_AND_OPTIONS[method][1])
        self.model, self.draws = Net(), draws
        self.base_cls, self.base_options = BASES[base]
        self.params = list(self.model.body.parameters())
        self.base = self.base_cls(self.params, **self.base_options)
        self.stage, self.failed, self.pairs, self.taken, self.active = IDLE, False, 0, 0, 0
        self.when, self.last_scale = self.options.pop("when", None), 1.0
        self.consumed, self.zeroed, self.grads_known, self.is_perturbed = True, False, True, False
        self.single_before = self.step_start = None
        self.kept, self.pending = [torch.zeros_like(p) for p in self.params], None

    # what is legal

    @property
    def selects(self):
        return self.row == "esam" and self.options["gamma"] < 1

    @property
    def scale(self):
        """Of rho, in a step that is under way or else in the next one; 0 where that is the base's."""
        if self.when is not None and self.stage == IDLE and not self.pairs:
            self.last_scale = self.when.scale(self.taken)
        return self.last_scale

    @property
    def owns_descent(self):
        return self.row in ("gsam", "looksam") and self.scale > 0

    def has_fresh(self):
        return not self.consumed and any(p.grad is not None and p.grad.any() for p in self.params)

    def may(self, call, t):
        """Whether a call is legal now, as the t-th perturbation."""
        idle, ready = self.stage == IDLE, self.stage == IDLE and not self.failed
        return {
            "step(losses)": idle,
            "step(closure)": ready
            and not (self.pairs == 0 and (self.selects or self.row == "msam" or self.has_fresh())),
            "ascent": ready and not self.selects,
            "descent": not self.failed and (self.stage == ASCENDED or (idle and self.single_before is not None)),
            "first_step": ready and not self.selects and self.row != "msam" and not self.consumed and not self.pairs,
            "second_step": self.stage == FIRST and not self.failed,
            "step()": (self.stage == FIRST and not self.failed)
            or (ready and (self.pairs > 0 or not self.has_second(t) or self.may_be_the_bases())),
            "restore": self.stage in (IDLE, ASCENDED, FIRST),
            "state_dict": self.stage not in (DESCENT, FIRST),
            "copy": self.stage not in (DESCENT, FIRST),
            "load_state_dict": idle,
            "add_param_group": idle,
            "base step": not self.is_perturbed,
        }[call]

    def may_be_the_bases(self):
        """Whether a step of the base alone is not refused."""
        is_there = any(p.grad is not None for p in self.params)
        return not is_there or (self.active > 0 and (self.zeroed or not self.consumed))

    # the method

    def masks(self, t):
        words, limit = (
            philox.first_words(len(self.params), t, self.options["seed"]),
            philox.threshold(self.options["beta"]),
        )
        return [word < limit for word in words]

    def has_second(self, t):
        if not self.scale:
            return False
        if self.row == "looksam":
            return self.active % self.options["k"] == 0
        return self.row != "esam" or any(m for m, p in zip(self.masks(t), self.params, strict=True) if p.requires_grad)

    def eps(self, g, t):
        g = [torch.zeros_like(p) if g_n is None else g_n for p, g_n in zip(self.params, g, strict=True)]
        if not any(g_n.any() for g_n in g):
            return g
        rho = self.scale * self.options["rho"]
        if self.row == "asam":
            w = [p.detach().abs() for p in self.params]
            tg = [w_n * g_n for w_n, g_n in zip(w, g, strict=True)]
            return [w_n * e for w_n, e in zip(w, radial(tg, rho), strict=True)]
        if self.row == "esam":
            g = [g_n if m else torch.zeros_like(g_n) for g_n, m in zip(g, self.masks(t), strict=True)]
            return radial(g, rho / self.options["beta"])
        return radial(g, rho)

    def combine(self, g, d):
        """d of a second pass, with g of the first; of a step without a second one, g is None."""
        if not self.owns_descent:
            return d
        given = [g or [None] * len(d), d]
        if all(g_n is None and d_n is None for g_n, d_n in zip(*given, strict=True)):
            return d
        zeros = [torch.zeros_like(p) for p in self.params]
        filled = [[z if v is None else v for z, v in zip(zeros, side, strict=True)] for side in given]
        first, second = filled
        if self.row == "gsam":
            return gsam_gradient(first, second) if dot(second, second) > 0 else second
        if g is None:
            return looksam_gradient(second, self.kept, self.options["alpha"])
        found = looksam_vector(first, second) if dot(first, first) > 0 else zeros
        self.pending = found if self.pending is None else [a + b for a, b in zip(self.pending, found, strict=True)]
        return second

    # pieces of passes

    def grads(self):
        return [p.grad for p in self.params]

    def put(self, grads):
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g

    def buffers(self):
        return [b.clone() for b in self.model.buffers()]

    def set_buffers(self, values):
        for b, value in zip(self.model.buffers(), values, strict=True):
            b.copy_(value)

    def losses(self, x, y):
        """A forward with the mirror's random numbers."""
        with torch.random.fork_rng():
            torch.set_rng_state(self.draws)
            losses = losses_of(self.model)(x, y)
            self.draws = torch.get_rng_state()
        return losses

    def backward(self, batch, weight=1.0):
        losses = self.losses(*batch)
        (losses.mean() * weight).backward()
        if self.stage in (IDLE, FIRST, ASCENDED):
            self.consumed = False
        return losses.detach()

    def start_pass(self):
        if self.step_start is None:
            self.step_start = self.buffers()
        if not self.pairs and self.consumed and not self.zeroed:
            self.put([None] * len(self.params))

    def enter_ascent(self, t):
        self.start_pass()
        self.is_single = not self.has_second(t)
        self.stage, self.started, self.aside = ASCENT, self.draws, None
        self.found = self.buffers()
        if self.is_single:
            self.single_before = [None if g is None else g.clone() for g in self.grads()]
        if not self.is_single or self.owns_descent:
            self.aside = self.grads()
            self.put([None] * len(self.params))

    def leave_ascent(self):
        if self.is_single:
            self.add_aside(self.combine(None, self.grads()))
            self.pairs, self.stage, self.consumed = self.pairs + 1, IDLE, False
            return
        self.g = self.grads()
        self.put(self.aside)
        self.stage, self.aside = ASCENDED, None

    def add_aside(self, d):
        if self.aside is not None:
            pairs = zip(self.aside, d, strict=True)
            d = [b if a is None else a if b is None else a + b for a, b in pairs]
        self.put(d)
        self.aside = None

    def enter_descent(self, t):
        self.is_needless = self.stage == IDLE
        self.left = self.buffers(), self.draws
        self.is_perturbed = not self.is_needless and any(g is not None for g in self.g)
        self.weights, eps = [p.detach().clone() for p in self.params], None
        if self.is_needless:
            self.put(self.single_before)
            self.single_before, self.g = None, None
            self.pairs -= 1
        else:
            eps = self.eps(self.g, t)
        self.draws = self.started
        self.set_buffers(self.found)
        self.stage, self.aside = DESCENT, None
        if self.owns_descent:
            self.aside = self.grads()
            self.put([None] * len(self.params))
        for p, e in zip(self.params, eps or [], strict=eps is not None):
            p.data.add_(e)

    def unperturb(self):
        if not self.is_perturbed:
            return
        self.is_perturbed = False
        for p, w in zip(self.params, self.weights, strict=True):
            p.data.copy_(w)

    def leave_descent(self):
        self.unperturb()
        self.set_buffers(self.left[0])
        self.draws = self.left[1]
        self.add_aside(self.combine(self.g, self.grads()))
        self.pairs, self.stage, self.consumed = self.pairs + 1, IDLE, False

    def fail(self):
        """A pass has failed."""
        if self.stage == DESCENT:
            self.unperturb()
            self.draws = self.left[1]
        self.forget_buffers()
        self.stage, self.failed, self.single_before, self.pending, self.grads_known = IDLE, True, None, None, False

    def forget_buffers(self):
        if self.step_start is not None:
            self.set_buffers(self.step_start)
        self.step_start = None

    # steps

    def forget(self):
        self.pairs, self.failed, self.single_before, self.pending, self.step_start = 0, False, None, None, None

    def start_afresh(self):
        self.forget()
        self.put([None] * len(self.params))
        self.consumed, self.zeroed, self.grads_known = True, False, True

    def update(self, is_counted):
        self.base.step()
        if self.row == "looksam" and self.pending is not None and self.active % self.options["k"] == 0:
            self.kept = self.pending
        self.active += is_counted and self.scale > 0
        self.taken += is_counted
        self.consumed, self.zeroed = True, False
        self.forget()

    def pair(self, batch, t, weight=1.0):
        self.enter_ascent(t)
        first = self.backward(batch, weight if self.is_single else 1.0)
        self.leave_ascent()
        if self.is_single:
            return
        self.enter_descent(t)
        if self.selects and any(g is not None and m for g, m in zip(self.g, self.masks(t), strict=True)):
            k = max(2, int(self.options["gamma"] * len(first) + 1e-6))
            with torch.no_grad():
                delta = self.losses(*batch) - first
            self.set_buffers(self.left[0])
            self.draws = self.started
            rows = delta.argsort(descending=True, stable=True)[:k].sort().values
            batch = [part[rows] for part in batch]
        self.backward(batch, weight)
        self.leave_descent()

    def step_on_batch(self, batch, t):
        self.start_afresh()
        n = len(batch[0])
        cuts = self.row == "msam" and self.scale > 0
        parts = [part.chunk(self.options["num_shards"]) for part in batch] if cuts else [[part] for part in batch]
        for shard in zip(*parts, strict=True):
            self.pair(shard, t, len(shard[0]) / n)
        self.update(True)

    def step(self, t):
        if self.stage == FIRST:
            self.second_step(False)
            return
        is_counted = self.pairs > 0
        if not is_counted and not self.has_second(t):
            self.put(self.combine(None, self.grads()))
            is_counted = True
        self.update(is_counted)

    def first_step(self, zero_grad, t):
        self.start_of_first = self.buffers()
        self.g = [None if g is None else g.clone() for g in self.grads()]
        self.weights = [p.detach().clone() for p in self.params]
        self.is_perturbed = self.has_second(t)
        if self.is_perturbed:
            for p, e in zip(self.params, self.eps(self.g, t), strict=True):
                p.data.add_(e)
        else:
            self.g = None
        self.stage = FIRST
        if zero_grad:
            self.zero_grad(True)

    def second_step(self, zero_grad):
        self.put(self.combine(self.g, self.grads()))
        self.unperturb()
        self.set_buffers(self.start_of_first)
        self.stage = IDLE
        self.update(True)
        if zero_grad:
            self.zero_grad(True)

    def zero_grad(self, set_to_none):
        if self.stage == ASCENT and not self.pairs and self.aside is not None:
            self.aside = [None] * len(self.params)
        if self.stage == ASCENT and not self.pairs and self.is_single:
            self.single_before = [None] * len(self.params)
        for p in self.params:
            p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p.grad)
        self.consumed, self.zeroed = True, not set_to_none
        if self.stage == IDLE:
            self.grads_known = True
            self.forget()

    def restore(self):
        if self.stage == FIRST:
            self.unperturb()
            self.set_buffers(self.start_of_first)
        else:
            self.forget_buffers()
        self.stage, self.single_before, self.pending = IDLE, None, None

    def base_step(self):
        self.base.step()
        self.consumed, self.zeroed = True, False

    def forget_copy(self):
        """What a copy of the optimizer and its model has of a step that is under way: nothing."""
        self.put([None] * len(self.params))
        self.consumed, self.zeroed, self.grads_known = True, False, True
        self.forget()

    def add_group(self):
        self.model.shift.requires_grad_(True)
        self.params = [*self.params, self.model.shift]
        self.kept = [*self.kept, torch.zeros_like(self.model.shift)]
        self.single_before = self.single_before and [*self.single_before, None]
        self.pending = self.pending and [*self.pending, torch.zeros_like(self.model.shift)]
        self.base.add_param_group({"params": [self.model.shift]})

    def adopt(self, model, opt):
        """Take over the last bits of another's numbers, which are equal but for rounding."""
        mine = [*self.model.parameters(), *self.model.buffers()]
        for a, b in zip(mine, [*model.parameters(), *model.buffers()], strict=True):
            a.data.copy_(b.data)
        for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        state = copy.deepcopy(opt.base_optimizer.state_dict())
        for group in state["param_groups"]:
            for key in [key for key in group if key not in self.base.defaults and key != "params"]:
                del group[key]
        state["state"] = {
            i: {k: v for k, v in entries.items() if not k.startswith("fastsam_")}
            for i, entries in state["state"].items()
        }
        self.base.load_state_dict(state)
