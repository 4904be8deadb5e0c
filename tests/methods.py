"""The other half of fastsam.methods, for the tests: what each row computes, in plain torch; base optimizers; ways.

An oracle is the method's equations in about ten lines, in float64, one tensor at a time. Of a row of kind "optimizer"
it is a function that returns the gradient d which the base optimizer steps with; of a row of kind "loss" a class with
the losses of the rows, and with what a step leaves behind for later ones.
"""

import copy
import math

import torch
import torch.nn.functional as F

from fastsam.graph.plain_step import as_stepper
from fastsam.kernels import philox

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}
"""Base optimizers of the laws: two that fastsam steps in a kernel, and one that takes its own step."""

ALL_BASES = BASES | {
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "damped": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "plain sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
}
"""With others, which SAM alone is tried with."""

OPTIONS = {
    "sam": {"rho": 0.1},
    "asam": {"rho": 0.5},
    "esam": {"rho": 0.1, "seed": 4},
    "msam": {"rho": 0.1, "num_shards": 3},
    "gsam": {"rho": 0.1},
    "looksam": {"k": 3},
    "saf": {"lag": 2, "start_epoch": 2, "lam": 1.0},
    "mesa": {"decay": 0.9, "start_epoch": 1},
}
"""Options in place of a row's, so that six steps on a small model show everything that a method does."""

VARIANT_OPTIONS = {("msam", "batched"): {"num_shards": 2}}
"""Likewise for a variant, beside those of its row."""


# ways of taking a step: `step(opt, losses, *batch)`, where `losses(*batch)` returns one loss for each row


def by_loss_function(opt, losses, *batch):
    return as_stepper(opt).step(losses, *batch)


def by_closure(opt, losses, *batch):
    def closure():
        opt.zero_grad()
        loss = losses(*batch).mean()
        loss.backward()
        return loss

    return opt.step(closure)


def by_backward(opt, losses, *batch):
    """With a backward of the caller's own."""
    opt.backward(losses, *batch, backward=lambda loss: loss.backward())
    opt.step()
    opt.zero_grad()


def by_contexts(opt, losses, *batch):
    """A pair of contexts for each part of the batch that the method perturbs by itself."""
    for pair in opt.passes(batch):
        with opt.ascent():
            losses(*pair.batch).mean().backward()
        with opt.descent():
            (losses(*pair.batch).mean() * pair.weight).backward()
    opt.step()
    opt.zero_grad()


def by_two_steps(opt, losses, *batch):
    losses(*batch).mean().backward()
    opt.first_step(zero_grad=True)
    losses(*batch).mean().backward()
    opt.second_step(zero_grad=True)


WAYS = {
    "loss_fn": by_loss_function,
    "backward": by_backward,
    "closure": by_closure,
    "contexts": by_contexts,
    "two_steps": by_two_steps,
}
"""By the names of `fastsam.methods.WAYS`."""


# oracles


class Step:
    """One step as an oracle sees it.

    Args:
        model: whose parameters are at w, and whose statistics a forward at w moves and any other leaves alone.
        losses: function of the batch that returns a loss for each row.
        batch: its arguments, of n rows each.
        options: the method's options; `lr`, the base optimizer's learning rate in this step; `way`, how it is taken.
        t: how many steps came before.
        memory: dict that lives as long as the training.
    """

    def __init__(self, model, losses, batch, options, t, memory):
        self.params, self.buffers = list(model.parameters()), list(model.buffers())
        self.names = [name for name, _ in model.named_parameters()]
        self.losses, self.batch, self.n = losses, batch, len(batch[0])
        self.options, self.t, self.memory = options, t, memory
        self.seen = []
        """Losses at w, of every look."""

    def look(self, eps=None, rows=None, chosen=None):
        """The losses at w + eps of these rows of the batch, and the gradient of the mean of the chosen ones of them."""
        w, statistics = [p.detach().clone() for p in self.params], self.statistics()
        with torch.no_grad():
            for p, e in zip(self.params, eps or [], strict=eps is not None):
                p.add_(e)
        losses = self.losses(*(self.batch if rows is None else [t[rows] for t in self.batch]))
        gradient = torch.autograd.grad((losses if chosen is None else losses[chosen]).mean(), self.params)
        with torch.no_grad():
            for p, w_n in zip(self.params, w, strict=True):
                p.copy_(w_n)
        if eps is None:
            self.seen.append(losses.detach())
        else:
            self.set_statistics(statistics)
        return losses.detach(), list(gradient)

    def statistics(self):
        return [b.clone() for b in self.buffers]

    def set_statistics(self, values):
        for b, value in zip(self.buffers, values, strict=True):
            b.copy_(value)


def dot(some, others):
    return sum((a * b).sum() for a, b in zip(some, others, strict=True))


def radial(g, rho):
    """eps = rho g / ||g||."""
    norm = dot(g, g).sqrt() + 1e-12
    return [rho * g_n / norm for g_n in g]


def plain(step):
    return step.look()[1]


def dual(g, rho, p):
    """Eq. 2 as printed, with sums of whole powers."""
    if p == 2:
        return radial(g, rho)
    if math.isinf(p):
        return [rho * g_n.sign() for g_n in g]
    q = p / (p - 1)
    total = sum(g_n.abs().pow(q).sum() for g_n in g)
    return [rho * g_n.sign() * g_n.abs().pow(q - 1) / total ** (1 / p) for g_n in g]


def sam(step):
    _, g = step.look()
    return step.look(dual(g, step.options["rho"], step.options.get("p", 2)))[1]


def asam(step):
    """T = |w|, or in the authors' code |w| + 0.01 for weights and 1 for biases and the like."""
    if step.options["adaptive"] == "official":
        pairs = zip(step.names, step.params, strict=True)
        t, e0 = [p.detach().abs() + 0.01 if "weight" in name else torch.ones_like(p) for name, p in pairs], 1e-16
    else:
        t, e0 = [p.detach().abs() for p in step.params], 1e-12
    _, g = step.look()
    tg = [t_n * g_n for t_n, g_n in zip(t, g, strict=True)]
    norm = dot(tg, tg).sqrt() + e0
    return step.look([step.options["rho"] * t_n * tg_n / norm for t_n, tg_n in zip(t, tg, strict=True)])[1]


def esam(step):
    o, indexed = step.options, list(enumerate(step.params))
    if o["mask"] == "tensor":
        words = philox.first_words(len(indexed), step.t, o["seed"])
        m = [torch.full_like(p, words[i] < philox.threshold(o["beta"])) for i, p in indexed]
    else:
        drawn = [philox.words(p.numel(), i, step.t, o["seed"]).view_as(p) for i, p in indexed]
        m = [(word < philox.threshold(o["beta"])).double() for word in drawn]
    first, g = step.look()
    if not any(m_n.any() for m_n in m):
        return g
    mg = [m_n * g_n for m_n, g_n in zip(m, g, strict=True)]
    norm = dot(g, g).sqrt() if o.get("norm") == "full" else dot(mg, mg).sqrt()
    norm = norm / math.sqrt(o["beta"]) if o.get("norm") == "estimated" else norm
    eps = [o["rho"] / o["beta"] * mg_n / (norm + 1e-12) for mg_n in mg]
    if o["gamma"] == 1:
        return step.look(eps)[1]
    delta, k = step.look(eps)[0] - first, math.floor(o["gamma"] * step.n + 1e-6)
    rows = delta.argsort(descending=True, stable=True)[:k]
    rows = rows[delta[rows] > delta[rows].min()] if o.get("strict") else rows
    return step.look(eps, chosen=rows)[1] if o.get("selection") == "reuse" else step.look(eps, rows=rows)[1]


def msam(step):
    o, n = step.options, step.n
    m, size = o["num_shards"], o.get("shard_size")
    sizes = [n // m + (i < n % m) for i in range(m)] if m else [min(size, n - i) for i in range(0, n, size)]
    shares = [1 / len(sizes) if o.get("weighting") == "uniform" else size / n for size in sizes]
    one_by_one = o.get("bn_update") == "sequential"
    # between contexts nobody says how many rows a pair had
    counts = [1 / len(sizes) if o["way"] == "contexts" else size / n for size in sizes]
    start, left, d = step.statistics(), [], [torch.zeros_like(p) for p in step.params]
    for rows, share in zip(torch.arange(n).split(sizes), shares, strict=True):
        if not one_by_one:
            step.set_statistics(start)
        _, g = step.look(rows=rows)
        left.append(step.statistics())
        g_adv = step.look(radial(g, o["rho"]), rows)[1]
        d = [d_n + share * v for d_n, v in zip(d, g_adv, strict=True)]
    if not one_by_one:
        for b, of_shards in zip(step.buffers, zip(*left, strict=True), strict=True):
            mean = sum(s * share for s, share in zip(of_shards, counts, strict=True))
            b.copy_(mean if b.is_floating_point() else of_shards[0])  # a counter counts one update
    return d


def gsam_gradient(g, g_adv, alpha=0.4):
    """d = g_adv - alpha g_perp, g_perp = g - (g . g_adv / ||g_adv||^2) g_adv."""
    along = dot(g, g_adv) / dot(g_adv, g_adv)
    return [v - alpha * (u - along * v) for u, v in zip(g, g_adv, strict=True)]


def gsam(step):
    o, rho = step.options, step.options["rho"]
    if "rho_min" in o:
        rho = o["rho_min"] + (rho - o["rho_min"]) * o["lr"] / o["lr_max"]
    _, g = step.look()
    return gsam_gradient(g, step.look(radial(g, rho))[1], o["alpha"])


def looksam_vector(g, g_adv):
    """g_v = g_adv - (g . g_adv / ||g||^2) g."""
    along = dot(g, g_adv) / dot(g, g)
    return [v - along * u for u, v in zip(g, g_adv, strict=True)]


def looksam_gradient(g, g_v, alpha=0.7):
    """d of a step without a second pass."""
    factor = alpha * dot(g, g).sqrt() / (dot(g_v, g_v).sqrt() + 1e-8)
    return [u + factor * v for u, v in zip(g, g_v, strict=True)]


def looksam(step):
    o, by_tensor = step.options, step.options.get("scope") == "tensor"
    _, g = step.look()
    parts = [slice(i, i + 1) for i in range(len(g))] if by_tensor else [slice(None)]
    if step.t % o["k"] == 0:
        d = step.look(radial(g, o["rho"]))[1]
        step.memory["g_v"] = [v for part in parts for v in looksam_vector(g[part], d[part])]
        return d
    g_v = step.memory["g_v"]
    return [d for part in parts for d in looksam_gradient(g[part], g_v[part], o["alpha"])]


def divergence(t, z, tau=5.0):
    """tau^2 KL(softmax(t / tau) || softmax(z / tau)) of each row."""
    log_q, log_p = (logits.double().div(tau).log_softmax(1) for logits in (z, t))
    return tau**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


class SAF:
    """Every sample is compared with its own logits of `lag` epochs ago."""

    def __init__(self, model, options):
        self.options, self.records = options, {}

    def losses(self, z, x, y, ids, epoch):
        rows, past = F.cross_entropy(z, y, reduction="none"), self.records.get(epoch - self.options["lag"])
        if past is None or epoch <= self.options["start_epoch"]:
            return rows
        return rows + self.options["lam"] * divergence(past[ids], z)

    def after_step(self, first_logits, ids, epoch):
        if self.options.get("history_dtype") == torch.int8:
            scale = first_logits.float().abs().amax(1, keepdim=True) * (1 / 127)
            kept = (first_logits.float() / scale).round() * scale.double()
        else:
            kept = first_logits.half()
        self.records[epoch] = kept[ids.argsort()].double()


class MESA:
    """Every sample is compared with the logits of the average of the weights."""

    def __init__(self, model, options):
        self.options, self.model, self.average = options, model, copy.deepcopy(model).eval()

    def losses(self, z, x, y, ids, epoch):
        rows = F.cross_entropy(z, y, reduction="none")
        if epoch <= self.options["start_epoch"]:
            return rows
        with torch.no_grad():
            past = self.average(x)
        return rows + self.options["lam"] * divergence(past, z)

    @torch.no_grad()
    def after_step(self, first_logits, ids, epoch):
        tensors = ([*m.parameters(), *m.buffers()] for m in (self.average, self.model))
        for v, w in zip(*tensors, strict=True):
            v.copy_(self.options["decay"] * v + (1 - self.options["decay"]) * w if v.is_floating_point() else w)


ORACLES = {
    "sgd": plain,
    "adamw": plain,
    "sam": sam,
    "asam": asam,
    "esam": esam,
    "msam": msam,
    "gsam": gsam,
    "looksam": looksam,
    "saf": SAF,
    "mesa": MESA,
}
"""By the rows of fastsam.methods.METHODS."""
