"""What the launchers compute, in numbers that carry a bound on their error: the truth for tests of exactness."""

import math

import torch
from error_bounds import Bounded, average, norm

E0 = 1e-12


def arithmetic_of(*tensors):
    """The dtype of arithmetic on these: float64 where one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def scaled_norm(grads, weights=None, etas=None):
    """||T g|| over all tensors, T = 1 or |w| + eta."""
    parts = []
    for g, w, eta in zip(grads, weights or grads, etas or [None] * len(grads), strict=True):
        if eta is None:
            parts.append(Bounded.exact(g, arithmetic_of(g)))
        else:
            dtype = arithmetic_of(g, w)
            parts.append(Bounded.exact(g, dtype) * (Bounded.exact(w, dtype).abs() + eta))
    return norm(parts)


def perturbed(w, g, rho, eta, norm):
    """SAM's and ASAM's perturbed weight, w + rho T^2 g / (norm + 1e-12); the factor of T^2 g is one number."""
    dtype = arithmetic_of(w)
    w, eps = Bounded.exact(w, dtype), Bounded.exact(g, dtype) * (rho / (float(norm) + E0))
    if eta is not None:
        t = w.abs() + eta
        eps = eps * t * t
    return w + eps


def _final_gradient(w, g, o, scale, decay):
    """The unscaled gradient, and the one that the step follows."""
    unscaled = g * (1 / scale) if scale else g
    g = -unscaled if o.maximize else unscaled
    return unscaled, g + decay * w if decay else g


def sgd_step(w, g, m, o, scale=None):
    """torch.optim.SGD's step: the weight, the unscaled gradient and the momentum, None without one."""
    dtype = arithmetic_of(w)
    w, g = Bounded.exact(w, dtype), Bounded.exact(g, dtype)
    unscaled, g = _final_gradient(w, g, o, scale, o.weight_decay)
    if m is not None:
        m = o.momentum * Bounded.exact(m, dtype) + (1 - o.dampening) * g
        g = g + o.momentum * m if o.nesterov else m
    return w - float(o.lr) * g, unscaled, m


def _correction(beta, step, device):
    """1 - beta^step in float64, which a beta near 1 makes a difference of near numbers."""
    power = Bounded.exact(torch.tensor(0.0 if beta == 0 else float(step), device=device), torch.float64)
    return 1 - (power * math.log(beta)).exp() if beta else 1 - power


def adam_step(w, g, m, v, step, o, scale=None, largest=None):
    """torch.optim.Adam's and AdamW's step number `step`: the weight, the unscaled gradient and both moments."""
    dtype, lr = arithmetic_of(w), float(o.lr)
    w, g = Bounded.exact(w, dtype), Bounded.exact(g, dtype)
    unscaled, g = _final_gradient(w, g, o, scale, 0 if o.decoupled else o.weight_decay)
    if o.decoupled and o.weight_decay:
        w = w * (1 - lr * o.weight_decay)
    m = average(Bounded.exact(m, dtype), g, o.beta1)
    v = average(Bounded.exact(v, dtype), g * g, o.beta2)
    peak = v
    if largest is not None:
        is_old = largest.double() > v.value
        old = Bounded.exact(largest, dtype)
        peak = Bounded(torch.where(is_old, old.value, v.value), v.error, dtype)
    denominator = peak.sqrt() / _correction(o.beta2, step, w.value.device).sqrt().to(dtype) + o.eps
    step_size = (lr / _correction(o.beta1, step, w.value.device)).to(dtype)
    return w - step_size * m / denominator, unscaled, m, v


def moving_average(v, w, decay):
    """decay v + (1 - decay) w."""
    dtype = arithmetic_of(v, w)
    return average(Bounded.exact(v, dtype), Bounded.exact(w, dtype), decay)


def _exponentials(x, rate=None):
    """x relative to the largest of its row, exp of that times `rate`, and their sum."""
    shifted = x - Bounded.exact(x.value.amax(1, keepdim=True), x.dtype)
    exponentials = (shifted if rate is None else shifted * rate).exp()
    return shifted, exponentials, exponentials.sum(1)


def trajectory_loss(logits, targets, past, has_past, counted, *, tau, weight, label_smoothing=0.0, scales=None):
    """Each row's cross-entropy + weight KL(past || logits) at temperature tau, and its gradient.

    Args:
        logits: [n, C].
        targets: int64 [n], or class probabilities [n, C].
        past: [n, C], the past logits of rows that have one.
        has_past: bool [n].
        counted: bool [n]; other rows have loss and gradient 0.
        scales: [n], factors that int8 values of the past are multiplied by.
    """
    dtype = arithmetic_of(logits)
    n_classes, columns = logits.shape[1], counted[:, None]
    if targets.dim() == 1:
        hot = torch.arange(n_classes, device=logits.device) == targets[:, None]
        share, total = Bounded.exact(hot.double(), dtype), Bounded.exact(columns.double(), dtype)
    else:
        share = Bounded.exact(targets, dtype)
    if label_smoothing:
        share = share * (1 - label_smoothing) + label_smoothing / n_classes
    if targets.dim() == 2:
        total = share.sum(1)
    shifted, e, e_sum = _exponentials(Bounded.exact(logits, dtype))
    losses = e_sum.log() * total - (share * shifted).sum(1)
    gradient = e / e_sum * total - share
    if has_past.any():
        t = Bounded.exact(torch.where(has_past[:, None], past.double(), 0.0), dtype)
        if scales is not None:
            t = t * Bounded.exact(scales[:, None], dtype)
        past_shifted, p, p_sum = _exponentials(t, 1 / tau)
        q = (shifted * (1 / tau)).exp()
        q_sum = q.sum(1)
        spread = (p * (past_shifted - shifted)).sum(1)
        divergence = spread / (p_sum * tau) - (p_sum / q_sum).log()
        pull = q / q_sum * (weight / tau) - p / p_sum * (weight / tau)
        rows = has_past[:, None]
        losses, gradient = losses + (weight * divergence).where(rows), gradient + pull.where(rows)
    losses, gradient = losses.where(columns), gradient.where(columns)
    return Bounded(losses.value[:, 0], losses.error[:, 0], dtype), gradient
