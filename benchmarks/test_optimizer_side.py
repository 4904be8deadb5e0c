"""Optimizer-side work of one step on the CPU beside the base's step: all but forward and backward, on real parameters.

And over as many tensors as ResNet-18 has, of four numbers each: the time of the host, which waits for no memory.
"""

import pytest
import torch

from benchmarks.arms.eager import EagerSAM
from benchmarks.arms.parameter_lists import LISTS
from fastsam import SAM

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-4}),
}


SIZES = {**LISTS, "host": lambda: [(4,)] * len(LISTS["resnet18"]())}


def parameters(name):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.05) for shape in SIZES[name]()]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return params


def steps(params, kind, base):
    cls, kwargs = BASES[base]
    plain = cls(params, **kwargs)
    if kind == "base":
        return plain.step
    if kind == "eager sam":
        eager = EagerSAM(params, plain)
        return lambda: (eager.first_step(), eager.second_step())
    opt = SAM.wrap(plain)

    def step():
        params[0].grad.add_(0)  # a fresh gradient, as a backward would leave
        opt.first_step()
        opt.second_step()

    return step


@pytest.mark.parametrize("kind", ["eager sam", "fastsam"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["resnet18", "host"])
def test_optimizer_side(benchmark, beside, name, base, kind):
    benchmark.group = f"{name}, {base}"
    ours, alone = (steps(parameters(name), work, base) for work in (kind, "base"))
    beside(ours, alone, 50 if name == "host" else 1)
