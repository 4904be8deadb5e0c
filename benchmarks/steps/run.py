"""Time of whole training steps, method by method, side by side.

    python -m benchmarks.steps.run --models resnet18,vit --methods sam,esam --out benchmarks/results/step_cpu.json
    python -m benchmarks.steps.run --models resnet50 --regimes eager,compiled,graph --amp bf16       on a GPU

Every round runs each arm once, in an order that changes from round to round, so that drifts of the machine hit all
alike; ratios are medians of the ratios within a round. Three denominators: the base optimizer as torch has it in eager
mode (over stock), its fused form (over fused), and the base optimizer in the regime of the method itself (over base),
which is the method's own price. "base again" is a second arm of that base: what differs by less than the two is noise.

Regimes: eager; compiled, the model under torch.compile; graph, the whole step in one CUDA graph, in which the base too
steps in fastsam's kernel. What cannot run in one is listed with the reason. Beside the time stand peak memory over the
base, launches, host reads and the passes that ran: rows through forward passes, with and without a graph, and rows and
tensors through backward passes.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import counts
from benchmarks.arms.ours import METHODS, Method
from benchmarks.arms.tasks import TASKS, Precision, Problem
from benchmarks.environment import environment
from benchmarks.steps.report import draw, table

REGIMES = ("eager", "compiled", "graph")
BASES = ("base", "base again", "base, fused")
BATCHES = 400
"""Of an epoch, for what remembers samples: as many as CIFAR-10 has of 128. A new epoch captures SAF's step anew."""
_WARM_UP = 6  # a captured step takes three as usual, and is captured in the fourth


class Arm:
    """One method on its own copy of one model, in one regime."""

    def __init__(self, work: "Workload", method: Method, regime: str) -> None:
        before = work.reset_memory()
        self.work, self.method, self.regime = work, method, regime
        self.problem = work.problem(regime)
        self._step, self.taken = method.build(self.problem), 0
        self.times: list[float] = []
        for _ in range(self._whole(_WARM_UP)):
            self.step()
        if work.device == "cuda" and not all(graph.captured for graph in self.problem.graphs):
            raise RuntimeError(f"still takes its steps as usual after {self.taken}")
        self.peak = work.peak_memory(before)

    def step(self) -> None:
        self._step(self.work.batches[self.taken % BATCHES])
        self.taken += 1

    def time(self, steps: int) -> None:
        steps = self._whole(steps)
        self.work.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.work.wait()
        self.times.append((time.perf_counter() - start) / steps)

    def count(self) -> dict[str, Any]:
        steps, work = self._whole(self.work.options.counted), self.work
        return counts.count(self.step, steps, self.problem.model, work.rows, work.device, self.regime)

    def _whole(self, steps: int) -> int:
        return -(-steps // self.method.period) * self.method.period


class Workload:
    """One model, its batches, and where and how steps on them are taken."""

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.task, self.options, self.device = TASKS[model], options, options.device
        self.rows = options.rows or self.task.rows[self.device]
        last = self.task.is_conv and (options.channels_last == "on" or
                                      (options.channels_last == "auto" and self.device == "cuda"))  # fmt: skip
        self.memory = torch.channels_last if last else torch.contiguous_format
        self.batches = self.task.batches(self.rows, BATCHES, self.device, self.memory)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.task.build(self.task.shape, self.task.classes).to(self.device, memory_format=self.memory)

    def problem(self, regime: str) -> Problem:
        compile_: Any = partial(nn.Module.compile, dynamic=False, backend=self.options.compiler)
        model = self.model()
        if regime == "compiled":
            compile_(model)
        return Problem(
            model, self.task.base, self.batches, self.task.classes, Precision(self.options.amp, self.device),
            is_captured=regime == "graph", compile=compile_ if regime == "compiled" else None,
        )  # fmt: skip

    def arm(self, method: Method, regime: str) -> Arm | str:
        """Return the arm, or why there is none."""
        reason = method.cannot.get(regime) or method.cannot.get(self.options.amp)
        if reason:
            return reason
        try:
            return Arm(self, method, regime)
        except Exception as error:  # a package may fail in any way, and a GPU be too small
            what = "not captured" if regime == "graph" else "not run"
            return f"{what}: {type(error).__name__}: {error}".split("\n")[0]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def reset_memory(self) -> int:
        gc.collect()
        if self.device != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_memory(self, before: int) -> int | None:
        return torch.cuda.max_memory_allocated() - before if self.device == "cuda" else None


def measure(work: Workload, methods: Mapping[str, Method], regime: str, stock: Arm, fused: Arm) -> dict[str, Any]:
    """Return one regime of a model: a row for each arm, why others are not there, and the noise."""
    options = work.options
    if regime == "compiled":
        torch._dynamo.reset()  # all modules share one cache, which every call searches
    base = stock if regime == "eager" else work.arm(METHODS["base"], regime)
    if isinstance(base, str):
        return {"arms": {}, "not run": {"base": base, **dict.fromkeys(methods, base)}, "noise": None}
    shared = {"base": base, "base, fused": fused} if regime == "eager" else {
        "eager base": stock, "eager base, fused": fused, "base": base
    }  # fmt: skip
    rows: dict[str, Any] = {}
    missing: dict[str, str] = {}
    noise: list[float] = []
    for names in _together([name for name in methods if name not in shared], regime, options.together):
        arms = dict(shared)
        for name in names:
            arm = work.arm(methods[name], regime)
            if isinstance(arm, str):
                missing[name] = arm
            else:
                arms[name] = arm
        counted = {name: arm.count() for name, arm in arms.items() if name not in rows}
        _take_turns(list(arms.values()), options.rounds, options.steps)
        for name in counted:
            rows[name] = _row(arms[name], {"stock": stock, "fused": fused, "base": base}) | counted[name]
        if "base again" in arms:
            noise = [t / o for t, o in zip(arms["base again"].times, base.times, strict=True)]
        del arms
    order = [name for name in [*shared, *methods] if name in rows]
    spread = [round(min(1.0, *noise), 3), round(max(1.0, *noise), 3)] if noise else None
    return {"arms": {name: rows[name] for name in dict.fromkeys(order)}, "not run": missing, "noise": spread}


def _together(names: list[str], regime: str, captured: int) -> Iterator[list[str]]:
    """Cut the arms into those that are timed side by side: a captured one holds the memory of its whole step."""
    n = captured if regime == "graph" else len(names)
    for start in range(0, len(names), max(n, 1)):
        yield names[start : start + n]


def _take_turns(arms: list[Arm], rounds: int, steps: int) -> None:
    for arm in arms:
        arm.times = []
    for i in range(rounds):
        for arm in random.Random(i).sample(arms, len(arms)):
            arm.time(steps)


def _row(arm: Arm, others: dict[str, Arm]) -> dict[str, Any]:
    def over(other: Arm) -> float:
        return round(statistics.median(t / o for t, o in zip(arm.times, other.times, strict=True)), 3)

    return {
        "milliseconds": round(statistics.median(arm.times) * 1e3, 3),
        "spread": [round(min(arm.times) * 1e3, 3), round(max(arm.times) * 1e3, 3)],
        **{f"over {name}": over(other) for name, other in others.items()},
        "peak memory over base": None if arm.peak is None else arm.peak - others["base"].peak,  # type: ignore[operator]
    }


def measure_model(model: str, methods: Mapping[str, Method], options: argparse.Namespace) -> dict[str, Any]:
    """Return all regimes of one model, and what it is."""
    work = Workload(model, options)
    # the base in eager mode, which every regime is held against too
    stock, fused = (Arm(work, METHODS[name], "eager") for name in ("base", "base, fused"))
    about = {
        "base": work.task.base.func.__name__,
        "rows": work.rows,
        "parameters": sum(p.numel() for p in stock.problem.model.parameters()),
        "channels last": work.memory is torch.channels_last,
    }
    regimes = {}
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):  # or it would run eagerly
        for regime in options.regimes:
            regimes[regime] = measure(work, methods, regime, stock, fused)
            print(table(model, regime, about, regimes[regime]), end="\n\n", flush=True)
    return {**about, "regimes": regimes}


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.replace("+", ",") for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; choose from {'; '.join(known)}")
        return names

    return parse


def parser(description: str | None, models: str, methods: Sequence[str]) -> argparse.ArgumentParser:
    """Return the options of this benchmark for others that time whole steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_names(list(TASKS)), default=models.split(","), help="joined by commas")
    parser.add_argument("--methods", type=_names(methods), default=list(methods),
                        help="joined by commas, with + for a comma inside a name; the bases always run")  # fmt: skip
    parser.add_argument("--regimes", type=_names(REGIMES), default=["eager"], help=f"of {', '.join(REGIMES)}")
    parser.add_argument("--rows", type=int, help="batch size; default: the model's own for the device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps of an arm in a round; default: 50 on a GPU, 3 on the CPU")
    parser.add_argument("--counted", type=int, default=10,
                        help="steps whose launches and passes are counted; random masks vary them")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="autocast; fp16 scales its loss")
    parser.add_argument("--channels-last", choices=("auto", "on", "off"), default="auto",
                        help="memory format of convolutional nets; auto: on a GPU")  # fmt: skip
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile in the compiled regime")
    parser.add_argument("--together", type=int, default=1, help="captured arms side by side, besides the bases")
    parser.add_argument("--out", type=Path, help="JSON file for the results; a plot goes beside it")
    return parser


def run(module: str, methods: Mapping[str, Method], parser: argparse.ArgumentParser,
        arguments: Sequence[str] | None) -> dict[str, Any]:  # fmt: skip
    """Measure what the arguments ask for; write and return the record."""
    options = parser.parse_args(arguments)
    if options.steps is None:
        options.steps = 50 if options.device == "cuda" else 3
    for name, least in (("rounds", 1), ("steps", 1), ("together", 1), ("counted", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    chosen = {name: methods[name] for name in dict.fromkeys([*BASES, *options.methods])}
    record: dict[str, Any] = {
        "environment": environment(options.device, module, arguments),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "note": counts.NOTE,
        "models": {model: measure_model(model, chosen, options) for model in options.models},
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
        draw(record, options.out.with_suffix(".png"))
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    run("benchmarks.steps.run", METHODS, parser(__doc__, "resnet18,vit", list(METHODS)), arguments)


if __name__ == "__main__":
    main()
