"""Independent eager implementations that the library is held against."""

import torch


def sam_step(model, loss, base, rho=0.05, adaptive=False):
    """One step of SPEC's section 0 in plain torch, one tensor at a time; `loss()` is the mean loss on the batch."""
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
