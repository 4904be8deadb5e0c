"""Count gate: what one step of every method asks of a device, held against a committed record. Needs no GPU.

    python -m benchmarks.gates.count            count every method; 1 where a step asks for more than recorded
    python -m benchmarks.gates.count --renew    write what it is now into the record

Counted are, in the third step of a small net on Triton's interpreter: launches of our kernels, by name; torch's
operations outside forward and backward of the model, those that a GPU would run; and, in the whole step, reads that the
host waits for. Reads are counted again on the plain-torch twins as they are on a GPU, with no scalar read. Where all
tensors are on the CPU, a copy to it by `Tensor.to` cannot be seen.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam import ESAM, MESA, MSAM, SAF, SAM
from fastsam.kernels import reference_common

RECORD = Path(__file__).with_name("counts.json")
WARM_UP = 2
"""Steps ahead of the one that is counted: they make state, scratch and tables."""

Step = Callable[[], object]
Build = Callable[["Net", Tensor, Tensor, Tensor], Step]
"""Makes a method's step on one batch of inputs, labels and sample ids."""


class Net(nn.Module):
    """What is trained. Its forward is a pass, and not counted as the optimizer's work."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return logits, or the losses where there are labels."""
        logits = self.head(self.body(x))
        return logits if y is None else F.cross_entropy(logits, y, reduction="none")


def optimizer(net: Net, method: Callable = SAM, base: type[Optimizer] = SGD, **options: Any) -> Any:
    if base is SGD:
        options["momentum"] = 0.9
    return method(net.parameters(), base, model=net, lr=0.01, **options)


def ours(method: Callable = SAM, base: type[Optimizer] = SGD, **options: Any) -> Build:
    """One of our optimizers, which runs its passes itself."""

    def build(net: Net, x: Tensor, y: Tensor, ids: Tensor) -> Step:
        opt = optimizer(net, method, base, **options)
        return lambda: opt.step(net, x, y)

    return build


def scaled(net: Net, x: Tensor, y: Tensor, ids: Tensor) -> Step:
    opt, scaler = optimizer(net), torch.amp.GradScaler("cpu")

    def step() -> None:
        opt.step(net, x, y, scaler=scaler)
        scaler.update()

    return step


def in_contexts(net: Net, x: Tensor, y: Tensor, ids: Tensor) -> Step:
    opt = optimizer(net)

    def step() -> None:
        for context in (opt.ascent, opt.descent):
            with context():
                net(x, y).mean().backward()
        opt.step()

    return step


def plain(opt: Optimizer, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        opt.zero_grad()
        loss().backward()
        opt.step()

    return step


def sgd(net: Net) -> SGD:
    return SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)  # as a GPU would have it


def saf(**options: Any) -> SAF:
    loss = SAF(64, 10, lag=1, start_epoch=0, **options)
    loss.set_epoch(2)  # the first that may have a past
    return loss


def with_saf(net: Net, x: Tensor, y: Tensor, ids: Tensor) -> Step:
    loss = saf()
    return plain(sgd(net), lambda: loss(net(x), y, ids))


def sam_with_saf(net: Net, x: Tensor, y: Tensor, ids: Tensor) -> Step:
    loss, opt = saf(reduction="none"), optimizer(net)
    return lambda: opt.step(lambda x, y, ids: loss(net(x), y, ids), x, y, ids)


def with_mesa(net: Net, x: Tensor, y: Tensor, ids: Tensor) -> Step:
    loss, base = MESA(net, start_epoch=0), sgd(net)
    loss.attach(base)
    return plain(base, lambda: loss(net(x), y, x))


METHODS: dict[str, Build] = {
    "sgd": lambda net, x, y, ids: plain(sgd(net), lambda: net(x, y).mean()),
    "sam": ours(),
    "sam, adamw": ours(base=AdamW),
    "sam, rmsprop": ours(base=RMSprop),
    "sam, rmsprop, no check": ours(base=RMSprop, check_finite=False),
    "sam, no check": ours(check_finite=False),
    "sam, scaler": scaled,
    "sam, contexts": in_contexts,
    "asam": ours(adaptive=True),
    "esam": ours(ESAM),
    "esam, element mask": ours(ESAM, mask="element"),
    "esam, reuse": ours(ESAM, selection="reuse"),
    "esam, strict": ours(ESAM, strict=True),
    "msam": ours(MSAM, num_shards=2),
    "msam, batched": ours(MSAM, num_shards=2, execution="batched"),
    "saf": with_saf,
    "sam, saf": sam_with_saf,
    "mesa": with_mesa,
}
READS = {
    "sam, rmsprop": "a base that cannot skip a step on the device",
    "esam, strict": "how many rows are above the cut",
    "saf": "ids that are on the CPU are checked there",
    "sam, saf": "as saf, in both passes",
}
"""Which methods read, and what. The others read nothing."""


FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "detach_", "promote_types"}
"""Operations that a device has nothing to run for, besides views and the profiler's marks."""


class Counts(TorchDispatchMode):
    """Counts what happens inside, by name: `launches`, `operations` outside the passes, and `reads`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._in_pass = self._in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if _waits(func, args):
            self._count(self.reads, name)
        elif func.namespace == "aten" and not (self._in_pass or func.is_view or name in FREE):
            self._count(self.operations, name)
        return func(*args, **(kwargs or {}))

    def _count(self, counter: Counter[str], name: str) -> None:
        if not self._in_kernel:  # what the interpreter does is no operation of ours
            counter[name] += 1

    def launching(self, run: Callable) -> Callable:
        """Count a kernel where it is run."""

        @wraps(run)
        def counted(kernel: Any, *args: Any, **kwargs: Any) -> None:
            self._count(self.launches, kernel.fn.__name__)
            self._in_kernel = True
            run(kernel, *args, **kwargs)
            self._in_kernel = False

        return counted

    def reading(self, read: Callable) -> Callable:
        """Count a read that is no operation, as those of tensors on the CPU."""

        @wraps(read)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(self.reads, read.__name__)
            return read(*args, **kwargs)

        return counted

    def passing(self, run: Callable) -> Callable:
        """Leave the operations of a forward or a backward uncounted."""

        @wraps(run)
        def uncounted(*args: Any, **kwargs: Any) -> Any:
            outer, self._in_pass = self._in_pass, True
            result = run(*args, **kwargs)
            self._in_pass = outer
            return result

        return uncounted


def _waits(func: Any, args: tuple) -> bool:
    """Whether the host has to know what lies on the device: a number, or the size of the result."""
    if func.name() == "aten::index.Tensor":
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def count(step: Step) -> Counts:
    """Count one step."""
    from triton.runtime.interpreter import GridExecutor

    counts = Counts()
    replaced = {
        counts.launching: [(GridExecutor, "__call__")],  # where all launches come by, whoever makes them
        counts.passing: [(Net, "forward"), (torch.autograd, "backward"), (torch.autograd, "grad")],
        counts.reading: [(Tensor, "tolist"), (Tensor, "numpy"), (Tensor, "cpu")],
    }
    with ExitStack() as stack:
        for replacement, places in replaced.items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, replacement(getattr(owner, name))))
        with counts:
            step()
    return counts


def count_step(build: Build, backend: str) -> Counts:
    """Count a later step of a method."""
    torch.manual_seed(0)
    x, y, ids = torch.randn(8, 3, 6, 6), torch.arange(8) % 10, torch.arange(8)
    fastsam.set_backend(backend)
    try:
        step = build(Net(), x, y, ids)
        for _ in range(WARM_UP):
            step()
        return count(step)
    finally:
        fastsam.set_backend(None)


def measure(name: str) -> dict[str, dict[str, int]]:
    """Return all counts of a method."""
    ours = count_step(METHODS[name], "triton")
    with patch.object(reference_common, "READ_SCALARS", False):
        twin = count_step(METHODS[name], "torch")
    found = {"launches": ours.launches, "operations": ours.operations, "reads": ours.reads, "twin reads": twin.reads}
    return {kind: dict(sorted(counter.items())) for kind, counter in found.items()}


def compare(now: dict[str, dict[str, int]], then: dict[str, dict[str, int]] | None) -> tuple[list[str], list[str]]:
    """Return what a step does more often than recorded, and what less often, in words."""
    if then is None:
        return ["not in the record: run with --renew"], []
    found: tuple[list[str], list[str]] = [], []
    for kind in now:
        for name in sorted(now[kind].keys() | then[kind].keys()):
            before, after = then[kind].get(name, 0), now[kind].get(name, 0)
            if before != after:
                found[after < before].append(f"{kind}: {name} {before} -> {after}")
    return found


def _as_text(found: dict[str, Any]) -> str:
    """JSON with a line for each method and kind."""
    return re.sub(r"(?<=\{)\n {6}|(?<=,)\n {5}(?= )|\n {4}(?=\})", "", json.dumps(found, indent=2)) + "\n"


def print_row(name: str, cells: list[Any]) -> None:
    print(f"{name:24}", *(f"{cell:>10}" for cell in cells), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--renew", action="store_true", help="write the counts into the record")
    renew = parser.parse_args(arguments).renew
    from fastsam.kernels import launch

    assert launch.INTERPRETED, "the kernels were imported without TRITON_INTERPRET=1"
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    print_row("", ["launches", "operations", "reads", "twin reads"])
    found = {}
    for name in METHODS:
        found[name] = measure(name)
        print_row(name, [sum(counter.values()) for counter in found[name].values()])
    if renew:
        RECORD.write_text(_as_text(found))
        return 0
    n_more = 0
    for name in METHODS:
        more, fewer = compare(found[name], known.get(name))
        for line in more:
            print(f"MORE {name}: {line}")
        for line in fewer:
            print(f"FEWER {name}: {line}: keep it so with --renew")
        n_more += len(more)
    print(f"{len(METHODS)} methods, {n_more} findings")
    return int(n_more > 0)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # no GPU warns of an overflow
    sys.exit(main())
