"""Independent eager implementations that the library is held against."""

import torch


def sam_step(model, loss, base, rho=0.05, adaptive=False):
    """One step of docs/algorithms.md#one-step in plain torch, tensor by tensor; `loss()` is the batch's mean loss."""
    params = [p for p in model.parameters() if p.requires_grad]
    g = torch.autograd.grad(loss(), params)
    statistics = [b.clone() for b in model.buffers()]
    with torch.no_grad():
        t = [p.abs() if adaptive else torch.ones_like(p) for p in params]
        norm = torch.sqrt(sum(((ti * gi) ** 2).sum() for ti, gi in zip(t, g, strict=True)))
        w = [p.clone() for p in params]
        for p, ti, gi in zip(params, t, g, strict=True):
            p.add_(rho * ti**2 * gi / (norm + 1e-12))
    d = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, wi in zip(params, w, strict=True):
            p.copy_(wi)
        for b, s in zip(model.buffers(), statistics, strict=True):
            b.copy_(s)
    for p, di in zip(params, d, strict=True):
        p.grad = di
    base.step()
    base.zero_grad()


def sam_step_on_ranks(model, losses, base, rho=0.05, sharing=1, adaptive=False):
    """One step over ranks in plain torch and one process (docs/algorithms.md#r-10).

    Groups of `sharing` neighbouring ranks share the perturbation of their mean gradient; gradients at the perturbed
    weights are averaged over all. `losses` holds for each rank a list of functions that return a mean loss, one for
    each shard of its batch; each shard makes a pair of passes of its own.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    w = [p.detach().clone() for p in params]
    total = [torch.zeros_like(p) for p in params]
    shards = len(losses[0])
    for first in range(0, len(losses), sharing):
        group = losses[first : first + sharing]
        for shard in range(shards):
            g = _mean_gradient(params, [of_rank[shard] for of_rank in group])
            t = [p.abs() if adaptive else torch.ones_like(p) for p in w]
            norm = torch.sqrt(sum(((ti * gi) ** 2).sum() for ti, gi in zip(t, g, strict=True)))
            with torch.no_grad():
                for p, wi, ti, gi in zip(params, w, t, g, strict=True):
                    p.copy_(wi + rho * ti**2 * gi / (norm + 1e-12))
            d = _mean_gradient(params, [of_rank[shard] for of_rank in group])
            with torch.no_grad():
                for p, wi in zip(params, w, strict=True):
                    p.copy_(wi)
            for sum_, di in zip(total, d, strict=True):
                sum_ += di * sharing / (len(losses) * shards)
    for p, di in zip(params, total, strict=True):
        p.grad = di
    base.step()
    base.zero_grad()


def _mean_gradient(params, losses):
    grads = [torch.autograd.grad(loss(), params, allow_unused=True) for loss in losses]
    return [
        sum(torch.zeros_like(p) if g is None else g for g in of_param) / len(losses)
        for p, of_param in zip(params, zip(*grads, strict=True), strict=True)
    ]


class Davda54SAM(torch.optim.Optimizer):
    """The two-step interface of github.com/davda54/sam (MIT, David Samuel), rewritten from its description.

    Norms of the tensors' norms, copies of the weights in `state[p]["old_p"]`, the storage swapped back.
    """

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.norm(
            torch.stack(
                [
                    ((p.abs() if group["adaptive"] else 1.0) * p.grad).norm(p=2)
                    for group in self.param_groups
                    for p in group["params"]
                    if p.grad is not None
                ]
            ),
            p=2,
        )
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_((p.pow(2) if group["adaptive"] else 1.0) * p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


def perturbed_gradients(params, loss, rho, buffers=()):
    """The gradients g at w and g_adv at w + rho g / ||g||, with the buffers as the first pass left them."""
    g = torch.autograd.grad(loss(), params)
    kept = [b.clone() for b in buffers]
    w = [p.detach().clone() for p in params]
    norm = torch.sqrt(sum((gi**2).sum() for gi in g)) + 1e-12
    with torch.no_grad():
        for p, gi in zip(params, g, strict=True):
            p.add_(rho * gi / norm)
    g_adv = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, wi in zip(params, w, strict=True):
            p.copy_(wi)
        for b, k in zip(buffers, kept, strict=True):
            b.copy_(k)
    return list(g), list(g_adv)
