"""The methods' equations in plain torch, a few lines each: what a step's final gradient d should be.

They use nothing of the engine: forwards of the user's loss function, `torch.autograd.grad`, and sums.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.esam import ESAM
from fastsam.gsam import GSAM
from fastsam.kernels import philox
from fastsam.looksam import LookSAM
from fastsam.msam import MSAM
from fastsam.sam import SAM
from fastsam.schedule import scale_of
from fastsam.two_pass.losses import Losses
from fastsam.two_pass.wrapper import TAKEN

Look = Callable[..., tuple[Losses, list[Tensor]]]
"""`look(batch, eps=None, rows=None, chosen=None)` returns the losses at w + eps, of these rows, and the gradient of the
mean of them by their weights, or of those chosen among them."""
Vector = list[Tensor]


def dot(some: Vector, others: Vector) -> Tensor:
    """Return the sum of the products of all entries."""
    return sum(((a.double() * b.double()).sum() for a, b in zip(some, others, strict=True)), torch.zeros(()))


class PlainStep:
    """What a reference knows of a step.

    Args:
        opt: the optimizer, for its hyperparameters alone.
        batch: the loss function's arguments.
        look: see `Look`.
        statistics: returns the running statistics of the model's norms, which a look at w moves.
    """

    def __init__(
        self, opt: Any, batch: tuple[Any, ...], look: Look, statistics: Callable[[], list[Tensor]] = list
    ) -> None:
        self.statistics = statistics
        self.opt, self.batch, self.look = opt, batch, look
        self.groups = [group for group in opt.param_groups for _ in group["params"]]
        self.params = [p for group in opt.param_groups for p in group["params"]]

    def option(self, name: str) -> list[Any]:
        """Return a hyperparameter for each parameter."""
        return [self.opt.option(group, name) for group in self.groups]

    def radii(self) -> list[float]:
        """Return rho for each parameter, times what `when=` scales it by in this step."""
        scale = scale_of(self.opt.when, self.groups[0][TAKEN])
        return [scale * rho for rho in self.option("rho")]

    def first(self, name: str) -> Any:
        """Return a hyperparameter of the first group."""
        return self.opt.option(self.opt.param_groups[0], name)

    def t_of_asam(self) -> tuple[Vector, float]:
        """Return T for each parameter, and e0: 1; |w| for ASAM; |w| + 0.01 for weights in its authors' code."""
        kinds = self.option("adaptive")
        names = self.opt.parameter_names() if "official" in kinds else [""] * len(kinds)
        t = [
            p.detach().abs() + (0.01 if kind == "official" else 0.0)
            if kind is True or (kind == "official" and "weight" in name)
            else torch.ones_like(p)
            for p, kind, name in zip(self.params, kinds, names, strict=True)
        ]
        return t, 1e-16 if "official" in kinds else 1e-12

    def radial(self, g: Vector, radii: Sequence[float], masks: Vector | None = None, norm: Any = None) -> Vector:
        """Return eps = rho m T^2 g / ||m T g||, downhill where a group maximizes."""
        t, e0 = self.t_of_asam()
        wanted = [float(perturb) for perturb in self.option("perturb")]
        m = [torch.full_like(p, w) for p, w in zip(self.params, wanted, strict=True)]
        m = m if masks is None else [a * b for a, b in zip(m, masks, strict=True)]
        tg = [m_n * t_n * g_n for m_n, t_n, g_n in zip(m, t, g, strict=True)]
        length = (norm(tg, m) if norm else dot(tg, tg).sqrt()) + e0
        if not torch.isfinite(length):
            return [torch.zeros_like(p) for p in self.params]
        signs = [-1.0 if group.get("maximize") else 1.0 for group in self.groups]
        rows = zip(signs, radii, t, tg, strict=True)
        return [(sign * rho * t_n * tg_n / length).to(tg_n.dtype) for sign, rho, t_n, tg_n in rows]

    def dual(self, g: Vector) -> Vector:
        """Return SAM's eps for its p (Eq. 2), in the form rho T sign(g) |T g|^(q-1) / (||T g||_q^q)^(1/p)."""
        p, radii = self.opt.p, self.radii()
        if p == 2:
            return self.radial(g, radii)
        t = self.t_of_asam()[0]
        wanted = self.option("perturb")
        tg = [(t_n * g_n).double() * float(w) for t_n, g_n, w in zip(t, g, wanted, strict=True)]
        top = max((v.abs().max().item() for v in tg if v.numel()), default=0.0)
        if not math.isfinite(top) or top == 0:
            return [torch.zeros_like(p_n) for p_n in self.params]
        tg = [v / top for v in tg]
        if p == 1:
            places = [(v.abs() == 1).flatten().nonzero().flatten() for v in tg]
            first = next(i for i, place in enumerate(places) if len(place))
            units = [torch.zeros_like(v) for v in tg]
            units[first].view(-1)[places[first][0]] = tg[first].view(-1)[places[first][0]].sign()
        else:
            q = 1.0 if math.isinf(p) else p / (p - 1)
            total = sum(v.abs().pow(q).sum().item() for v in tg)
            divisor = 1.0 if math.isinf(p) else total ** (1 / p)
            units = [v.sign() * v.abs().pow(q - 1) / divisor for v in tg]
        signs = [-1.0 if group.get("maximize") else 1.0 for group in self.groups]
        rows = zip(signs, radii, t, units, self.params, strict=True)
        return [(sign * rho * t_n * unit).to(p_n.dtype) for sign, rho, t_n, unit, p_n in rows]


def base_alone(step: PlainStep) -> Vector:
    """The base optimizer's gradient, in a step in which nothing is to be perturbed."""
    return step.look(step.batch)[1]


def sam(step: PlainStep) -> Vector:
    """SAM Eq. 2 and 3, ASAM Eq. 7."""
    _, g = step.look(step.batch)
    return step.look(step.batch, step.dual(g))[1]


def esam(step: PlainStep) -> Vector:
    """ESAM Eq. 4 to 6: masked perturbation, then the rows whose loss rises most."""
    opt, betas = step.opt, step.option("beta")
    t, seed = (opt.param_groups[0][f"fastsam_{key}"] for key in ("step", "seed"))
    first, g = step.look(step.batch)
    limits = [philox.threshold(beta) for beta in betas]
    if opt.given_mask is not None:
        given = zip(step.params, opt.given_mask, strict=True)
        masks = [torch.ones_like(p) * (m.to(p.device) if isinstance(m, Tensor) else m) for p, m in given]
    elif opt.mask == "tensor":
        words = philox.first_words(len(betas), t, seed)
        rows = zip(step.params, words, limits, strict=True)
        masks = [torch.full_like(p, float(word < limit)) for p, word, limit in rows]
    else:
        drawn = [philox.words(p.numel(), i, t, seed).view(p.shape).to(p.device) for i, p in enumerate(step.params)]
        rows_of_words = zip(drawn, limits, step.params, strict=True)
        masks = [(word < limit).to(p.dtype) for word, limit, p in rows_of_words]
    if not any(m.any() for m, wanted in zip(masks, step.option("perturb"), strict=True) if wanted):
        return g

    def norm(masked: Vector, _: Vector) -> Tensor:
        if opt.norm == "full":
            tg = [t_n * g_n for t_n, g_n in zip(step.t_of_asam()[0], g, strict=True)]
            return dot(tg, tg).sqrt()
        roots = [math.sqrt(beta) if opt.norm == "estimated" else 1.0 for beta in betas]
        scaled = [v / root for v, root in zip(masked, roots, strict=True)]
        return dot(scaled, scaled).sqrt()

    radii = [rho / beta for rho, beta in zip(step.radii(), betas, strict=True)]
    eps, n = step.radial(g, radii, masks, norm), len(first)
    smallest = 2 if opt.trains_batch_norm else 1
    k = min(n, max(smallest, math.floor(step.first("gamma") * n + 1e-6)))
    if k == n:
        return step.look(step.batch, eps)[1]
    delta = step.look(step.batch, eps)[0].ranked() - first.rows
    rows_kept = delta.argsort(descending=True, stable=True)[:k]
    rows_kept = rows_kept[delta[rows_kept] > delta[rows_kept].min()] if opt.strict else rows_kept
    rows_kept = rows_kept.sort().values
    if opt.selection == "reuse":
        return step.look(step.batch, eps, chosen=rows_kept)[1]
    return step.look(step.batch, eps, rows_kept)[1]


def msam(step: PlainStep) -> Vector:
    """mSAM Eq. 7, with n_i / n for 1 / m unless weighting="uniform"."""
    found = []
    start, left, pairs = [b.clone() for b in step.statistics()], [], step.opt.passes(step.batch)
    for pair in pairs:
        if step.opt.bn_update == "mean":
            _set(step.statistics(), start)
        losses, g = step.look(pair.batch)
        left.append([b.clone() for b in step.statistics()])
        g_adv = step.look(pair.batch, step.dual(g))[1]
        weighs = losses.weights is not None and not pair.counts_alike
        found.append((losses.weights.sum() if weighs else pair.weight, g_adv))  # type: ignore[union-attr]
    if step.opt.bn_update == "mean":
        shares = torch.tensor([pair.share for pair in pairs], dtype=torch.float64)
        _set(step.statistics(), [_mean(torch.stack(of_pairs), shares) for of_pairs in zip(*left, strict=True)])
    total = sum(weight for weight, _ in found)
    return [sum((w / total * g_adv[i] for w, g_adv in found), torch.zeros_like(p)) for i, p in enumerate(step.params)]


def _mean(stacked: Tensor, shares: Tensor) -> Tensor:
    """The mean of statistics by these shares; a counter counts one update."""
    if not stacked.is_floating_point():
        return stacked.amax(0)
    return torch.tensordot(shares.to(stacked.device), stacked.double(), 1)


def _set(buffers: Vector, values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def gsam(step: PlainStep) -> Vector:
    """GSAM's descent direction g_adv - alpha (g - (g . g_adv / ||g_adv||^2) g_adv)."""
    _, g = step.look(step.batch)
    radii = [step.opt.radius(group) for group in step.groups]
    g_adv = step.look(step.batch, step.radial(g, radii))[1]
    wanted = [i for i, perturb in enumerate(step.option("perturb")) if perturb]
    some, others = [g[i] for i in wanted], [g_adv[i] for i in wanted]
    along = dot(some, others) / dot(others, others)
    rows = zip(g, g_adv, step.option("alpha"), step.option("perturb"), strict=True)
    return [(v - alpha * (u - along * v)).to(v.dtype) if wanted else v for u, v, alpha, wanted in rows]


def looksam(step: PlainStep) -> Vector:
    """SAM in every k-th step, and between them g + alpha ||g|| / ||g_v|| g_v with the last one's g_v."""
    if step.opt.has_second_pass():
        return sam(step)
    _, g = step.look(step.batch)
    g_v = step.opt.states_of(step.params, "g_v")
    wanted = [i for i, perturb in enumerate(step.option("perturb")) if perturb]
    d = list(g)
    for part in [[i] for i in wanted] if step.opt.scope == "tensor" else [wanted]:
        some, kept = [g[i] for i in part], [g_v[i] for i in part]
        ratio = dot(some, some).sqrt() / (dot(kept, kept).sqrt() + 1e-8)
        for i in part:
            d[i] = (g[i] + step.option("alpha")[i] * ratio * g_v[i]).to(g[i].dtype)
    return d


REFERENCES: dict[type, Callable[[PlainStep], Vector]] = {
    SAM: sam,
    ESAM: esam,
    MSAM: msam,
    GSAM: gsam,
    LookSAM: looksam,
}
"""By the class of the optimizer."""
