"""Count gate: what one step of every method asks of a device, held against a committed record. Needs no GPU.

    python -m benchmarks gate count            count every method; 1 where a step asks for more than recorded
    python -m benchmarks gate count --renew    write what it is now into the record

Methods and variants are the rows of `fastsam.methods.METHODS`; other bases and ways of stepping stand here. Counted
are, in the third step of a small net on Triton's interpreter: launches of our kernels, by name; torch's operations
outside forward and backward of the model, those that a GPU would run; and, in the whole step, reads that the host waits
for. Reads are counted again on the plain-torch reference as they are on a GPU, with no scalar read. Where all tensors
are on the CPU, a copy to it by `Tensor.to` cannot be seen.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam.cli.files import write_text
from fastsam.kernels import reference_common
from fastsam.methods import METHODS

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


INSTEAD = {"msam": {"num_shards": 2}, "saf": {"lag": 1, "start_epoch": 0}, "mesa": {"start_epoch": 0}}
"""Hyperparameters for so small a batch, and for a third step that is like all later ones."""


def optimizer(net: Net, row: str = "sam", base: type[Optimizer] = SGD, **options: Any) -> Any:
    """Build an optimizer of the table."""
    base_options = {"lr": 0.01, **({"momentum": 0.9} if base is SGD else {})}
    return METHODS[row].build(net.parameters(), base, model=net, base_options=base_options, **options)


def in_one_call(net: Net, x: Tensor, y: Tensor, ids: Tensor, **options: Any) -> Step:
    """One of our optimizers, which runs its passes itself."""
    opt = optimizer(net, **options)
    return lambda: opt.step(net, x, y)


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


def base_alone(net: Net, x: Tensor, y: Tensor, ids: Tensor, row: str) -> Step:
    """A row of kind "base", with foreach as a GPU would have it."""
    base_options = {"lr": 0.01, "foreach": True, **({"momentum": 0.9} if row == "sgd" else {})}
    opt = METHODS[row].build(net.parameters(), SGD, base_options=base_options)
    return plain(opt, lambda: net(x, y).mean())


def loss_of(net: Net, row: str, **options: Any) -> Any:
    """Build a loss of the table, in the first epoch that may have a past."""
    loss: Any = METHODS[row].build_loss(model=net, num_samples=64, num_classes=10, **options)
    if METHODS[row].loss_needs == ("sample_ids",):
        loss.set_epoch(2)
    return loss


def with_loss(net: Net, x: Tensor, y: Tensor, ids: Tensor, row: str, **options: Any) -> Step:
    """A loss of ours beside SGD."""
    loss = loss_of(net, row, **options)
    base = SGD(net.parameters(), lr=0.01, momentum=0.9, foreach=True)
    given = {"sample_ids": ids, "inputs": x}
    if METHODS[row].loss_needs == ("inputs",):
        loss.attach(base)
    return plain(base, lambda: loss(net(x), y, *(given[need] for need in METHODS[row].loss_needs)))


def sam_with_saf(net: Net, x: Tensor, y: Tensor, ids: Tensor) -> Step:
    loss, opt = loss_of(net, "saf", reduction="none", **INSTEAD["saf"]), optimizer(net)
    return lambda: opt.step(lambda x, y, ids: loss(net(x), y, ids), x, y, ids)


def rows_of_the_table() -> dict[str, Build]:
    """Return how each variant of each method takes its step, by the names of the row and the variant."""
    ways = {"base": base_alone, "optimizer": in_one_call, "loss": with_loss}
    return {
        row if name == "default" else f"{row}, {name}": partial(
            ways[method.kind], row=row, **{**INSTEAD.get(row, {}), **variant.options}
        )
        for row, method in METHODS.items()
        for name, variant in method.variants.items()
    }


CASES: dict[str, Build] = {
    **rows_of_the_table(),
    # the third step of LookSAM has no second pass; with every other one, it has
    "looksam, second pass": partial(in_one_call, row="looksam", k=2),
    "looksam, by tensor, second pass": partial(in_one_call, row="looksam", k=2, scope="tensor"),
    "sam, adamw": partial(in_one_call, base=AdamW),
    "sam, rmsprop": partial(in_one_call, base=RMSprop),
    "sam, rmsprop, no check": partial(in_one_call, base=RMSprop, check_finite=False),
    "sam, no check": partial(in_one_call, check_finite=False),
    "sam, scaler": scaled,
    "sam, contexts": in_contexts,
    "sam, saf": sam_with_saf,
}
READS = {
    "adamw": "torch's own counts of steps, which lie on the host wherever the weights do",
    "sam, rmsprop": "a base that cannot skip a step on the device",
    "esam, strict": "how many rows are above the cut",
    **dict.fromkeys(("saf", "saf, int8 history", "saf, on the host"), "ids that are on the CPU are checked there"),
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
            self._count(self.operations, name, _times(name, args))
        return func(*args, **(kwargs or {}))

    def _count(self, counter: Counter[str], name: str, times: int = 1) -> None:
        if not self._in_kernel:  # what the interpreter does is no operation of ours
            counter[name] += times

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


def _times(name: str, args: tuple) -> int:
    """How many operations a device runs: of lists of several dtypes one for each tensor, of one dtype one in all."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    mixed = name.startswith("_foreach") and any(len({t.dtype for t in tensors}) > 1 for tensors in lists)
    return len(lists[0]) if mixed else 1


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
    ours = count_step(CASES[name], "triton")
    with patch.object(reference_common, "READ_SCALARS", False):
        twin = count_step(CASES[name], "torch")
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
    print(f"{name:32}", *(f"{cell:>10}" for cell in cells), flush=True)


def run(renew: bool = False) -> int:
    """Count every case; return the exit status, or write the record."""
    from fastsam.kernels import launch

    assert launch.INTERPRETED, "the kernels were imported without TRITON_INTERPRET=1"
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    print_row("", ["launches", "operations", "reads", "twin reads"])
    found = {}
    for name in CASES:
        found[name] = measure(name)
        print_row(name, [sum(counter.values()) for counter in found[name].values()])
    if renew:
        write_text(RECORD, _as_text(found))
        return 0
    n_more = 0
    for name in CASES:
        more, fewer = compare(found[name], known.get(name))
        for line in more:
            print(f"MORE {name}: {line}")
        for line in fewer:
            print(f"FEWER {name}: {line}: keep it so with --renew")
        n_more += len(more)
    print(f"{len(CASES)} methods, {n_more} findings")
    return int(n_more > 0)


@click.command("count")
@click.option("--renew", is_flag=True, help="Write the counts into the record.")
def command(renew: bool) -> int:
    """Count launches, operations and host reads in a step of every method and hold them against the record."""
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # no GPU warns of an overflow
    return run(renew)
