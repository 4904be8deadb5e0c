"""CPU gate: what fastsam may cost beside eager SAM and beside its base optimizer, measured in one run. Needs no GPU.

    python -m benchmarks gate cpu               print every figure and its bound; 1 where one is exceeded

Three kinds of time ratio. Optimizer side: everything but forward and backward, over ResNet-18's parameters, against a
SAM in the style of davda54/sam. Host: the same with four numbers in each tensor, which leaves the time of Python and of
torch's calls. Step: a whole SAM step of a small convolutional net against its base optimizer's step.
And, where times are too noisy to show it, every single pass over memory: the bytes that torch's operations touch on the
optimizer side, which are the same in every run.

Times are CPU time of one thread, so that other programs on the machine matter only through the memory they share. The
arms take turns, and the median of the rounds' ratios counts: eager SAM allocates in every step, and its fastest round
is now and then a third faster than its usual one, which says nothing of ours. A gate that is red after its rounds
measures as many again, for noise's sake, and the lowest median decides. What the memory and the caches of a processor
make of the optimizer side differs between machines (docs/measurements.md), so that its bounds say little more than
"faster than eager SAM"; the bytes hold the rest.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import rounds_option
from benchmarks.test_optimizer_side import parameters, steps
from fastsam import SAM

ATTEMPTS = 5


class Ratio(NamedTuple):
    """Two arms, each a function that runs one round, and how much longer the first may take."""

    over: Callable[[], object]
    under: Callable[[], object]
    bound: float


def optimizer_side(base: str, bound: float, sizes: str = "resnet18", repeats: int = 1) -> Ratio:
    ours, eager = (steps(parameters(sizes), kind, base) for kind in ("fastsam", "eager sam"))
    return Ratio(lambda: [ours() for _ in range(repeats)], lambda: [eager() for _ in range(repeats)], bound)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def whole_step(bound: float) -> Ratio:
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    model, plain = small_net(), small_net()
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    opt, base = SAM.wrap(sgd(model.parameters()), model=model), sgd(plain.parameters())

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    def base_step() -> None:
        base.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        base.step()

    return Ratio(lambda: opt.step(losses, x, y), base_step, bound)


RATIOS: dict[str, Callable[[], Ratio]] = {
    "optimizer side, sgd: SAM / eager SAM": partial(optimizer_side, "sgd", 0.95),
    "optimizer side, adamw: SAM / eager SAM": partial(optimizer_side, "adamw", 0.8),
    "host, sgd: SAM / eager SAM": partial(optimizer_side, "sgd", 0.8, "host", 50),
    "host, adamw: SAM / eager SAM": partial(optimizer_side, "adamw", 0.6, "host", 50),
    "whole step: SAM / sgd": partial(whole_step, 2.45),
}


BYTES = {"sgd": 68.2, "adamw": 76.2}
"""Bytes for each float32 parameter that one optimizer side may touch."""


CACHE = 2**20
"""Bytes that a core keeps at hand: half of its second-level cache, or all of a small one."""


class Traffic(TorchDispatchMode):
    """Adds up the bytes of what operations read and write; what they write counts twice, as caches fetch it first.

    What is among the last `cache` bytes touched is still at hand, and counts nothing.
    """

    def __init__(self, cache: int = CACHE) -> None:
        super().__init__()
        self.bytes = 0
        self.cache = cache
        self._at_hand: dict[int, int] = {}  # address and size of what was touched, the latest last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        for name, value in given.items():
            self._touch(value, 2 if name in written else 1)
        if not written:
            self._touch(result, 2)
        return result

    def _touch(self, tree: Any, times: int) -> None:
        for t in tree_leaves(tree):
            if isinstance(t, Tensor):
                known = self._at_hand.pop(t.data_ptr(), 0)
                self.bytes += times * max(0, t.nbytes - known)
                self._at_hand[t.data_ptr()] = max(known, t.nbytes)  # now the last one
        while sum(self._at_hand.values()) > self.cache:
            del self._at_hand[next(iter(self._at_hand))]


def bytes_per_parameter(base: str) -> float:
    params = parameters("resnet18")
    step = steps(params, "fastsam", base)
    step()
    with Traffic() as traffic:
        step()
    return traffic.bytes / sum(p.numel() for p in params)


def cpu_time(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def measure(ratio: Ratio, rounds: int) -> float:
    """Return the median ratio of `rounds` rounds; the lowest of a few such medians where it exceeds its bound."""
    ratio.over()  # makes the state and the scratch
    ratio.under()
    medians: list[float] = []
    for _ in range(ATTEMPTS):
        medians.append(statistics.median(cpu_time(ratio.over) / cpu_time(ratio.under) for _ in range(rounds)))
        if medians[-1] <= ratio.bound:
            break
    return min(medians)


@click.command("cpu")
@rounds_option(10, about="Of each arm, before the first verdict.")
def command(rounds: int) -> int:
    """Hold CPU time and memory traffic beside eager SAM and the base optimizer against their bounds."""
    torch.set_num_threads(1)
    print(f"{'':40} {'measured':>8} {'bound':>6}")
    verdicts = []
    for name, build in RATIOS.items():  # first of all: times depend on what the process has allocated before
        ratio = build()
        verdicts.append(report(name, measure(ratio, rounds), ratio.bound))
    verdicts += [report(f"optimizer side, {b}: bytes/parameter", bytes_per_parameter(b), n) for b, n in BYTES.items()]
    return int(not all(verdicts))


def report(name: str, found: float, bound: float) -> bool:
    """Print a row of the table and return whether the bound holds."""
    holds = found <= bound
    print(f"{name:40} {found:8.3f} {bound:6.2f}  {'ok' if holds else 'TOO MUCH'}", flush=True)
    return holds
