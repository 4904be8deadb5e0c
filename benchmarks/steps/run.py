"""Time of whole training steps, method by method, side by side.

    python -m benchmarks steps --models resnet18,vit --methods sam,esam --out benchmarks/results/step_cpu.json
    python -m benchmarks steps --models resnet50 --regimes eager,compiled,graph --amp bf16       on a GPU

Every round runs each arm once, in an order that changes from round to round, so that drifts of the machine hit all
alike; ratios are medians of the ratios within a round. Three denominators: the base optimizer as torch has it in eager
mode (over stock), its fused form (over fused), and the base optimizer in the regime of the method itself (over base),
which is the method's own price. "base again" is a second arm of that base: what differs by less than the two is noise.

Regimes: eager; compiled, the model under torch.compile; graph, the whole step in one CUDA graph, in which the base too
steps in fastsam's kernel. What cannot run in one is listed with the reason. Beside the time stand peak memory over the
base, launches, host reads and the passes that ran: rows through forward passes, with and without a graph, and rows and
tensors through backward passes.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import counts
from benchmarks.arms.ours import ARMS, Arm
from benchmarks.arms.tasks import TASKS, Precision, Problem
from benchmarks.harness import about_this_run, interleaved, noise, over, write_record
from benchmarks.steps.options import Options, step_options
from benchmarks.steps.report import draw, table

BASES = ("base", "base again", "base, fused")
BATCHES = 400
"""Of an epoch, for what remembers samples: as many as CIFAR-10 has of 128. A new epoch captures SAF's step anew."""
_WARM_UP = 6  # a captured step takes three as usual, and is captured in the fourth


class Timed:
    """One arm on its own copy of one model, in one regime."""

    def __init__(self, work: "Workload", arm: Arm, regime: str) -> None:
        before = work.reset_memory()
        self.work, self.arm, self.regime = work, arm, regime
        self.problem = work.problem(regime)
        self._step, self.taken = arm.build(self.problem), 0
        for _ in range(self._whole(_WARM_UP)):
            self.step()
        if work.device == "cuda" and not all(graph.captured for graph in self.problem.graphs):
            raise RuntimeError(f"still takes its steps as usual after {self.taken}")
        self.peak = work.peak_memory(before)

    def step(self) -> None:
        self._step(self.work.batches[self.taken % BATCHES])
        self.taken += 1

    def time(self, steps: int) -> float:
        """Take steps and return the seconds of one."""
        steps = self._whole(steps)
        self.work.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.work.wait()
        return (time.perf_counter() - start) / steps

    def count(self) -> dict[str, Any]:
        steps, work = self._whole(self.work.options.counted), self.work
        return counts.count(self.step, steps, self.problem.model, work.rows, work.device, self.regime)

    def _whole(self, steps: int) -> int:
        return -(-steps // self.arm.period) * self.arm.period


class Workload:
    """One model, its batches, and where and how steps on them are taken."""

    def __init__(self, model: str, options: Options) -> None:
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

    def timed(self, arm: Arm, regime: str) -> Timed | str:
        """Return the arm ready to be timed, or why it cannot be."""
        reason = arm.cannot.get(regime) or arm.cannot.get(self.options.amp)
        if reason:
            return reason
        try:
            return Timed(self, arm, regime)
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


def measure(work: Workload, arms: Mapping[str, Arm], regime: str, stock: Timed, fused: Timed) -> dict[str, Any]:
    """Return one regime of a model: a row for each arm, why others are not there, and the noise."""
    options = work.options
    if regime == "compiled":
        torch._dynamo.reset()  # all modules share one cache, which every call searches
    base = stock if regime == "eager" else work.timed(ARMS["base"], regime)
    if isinstance(base, str):
        return {"arms": {}, "not run": {"base": base, **dict.fromkeys(arms, base)}, "noise": None}
    shared = {"base": base, "base, fused": fused} if regime == "eager" else {
        "eager base": stock, "eager base, fused": fused, "base": base
    }  # fmt: skip
    fused_name = "base, fused" if regime == "eager" else "eager base, fused"
    rows: dict[str, Any] = {}
    missing: dict[str, str] = {}
    spread: list[float] | None = None
    for names in _together([name for name in arms if name not in shared], regime, options.together):
        timed = dict(shared)
        for name in names:
            found = work.timed(arms[name], regime)
            if isinstance(found, str):
                missing[name] = found
            else:
                timed[name] = found
        counted = {name: arm.count() for name, arm in timed.items() if name not in rows}
        times = interleaved({name: partial(arm.time, options.steps) for name, arm in timed.items()}, options.rounds)
        others = {"stock": times["base" if regime == "eager" else "eager base"], "fused": times[fused_name]}
        for name in counted:
            row = _row(times[name], others | {"base": times["base"]})
            rows[name] = row | _memory(timed[name], base) | counted[name]
        if "base again" in timed:
            spread = noise(times["base again"], times["base"])
        del timed
    order = [name for name in [*shared, *arms] if name in rows]
    return {"arms": {name: rows[name] for name in dict.fromkeys(order)}, "not run": missing, "noise": spread}


def _together(names: list[str], regime: str, captured: int) -> Iterator[list[str]]:
    """Cut the arms into those that are timed side by side: a captured one holds the memory of its whole step."""
    n = captured if regime == "graph" else len(names)
    for start in range(0, len(names), max(n, 1)):
        yield names[start : start + n]


def _row(times: list[float], others: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "milliseconds": round(statistics.median(times) * 1e3, 3),
        "spread": [round(min(times) * 1e3, 3), round(max(times) * 1e3, 3)],
        **{f"over {name}": over(times, other) for name, other in others.items()},
    }


def _memory(arm: Timed, base: Timed) -> dict[str, int | None]:
    return {"peak memory over base": None if arm.peak is None or base.peak is None else arm.peak - base.peak}


def measure_model(model: str, arms: Mapping[str, Arm], options: Options) -> dict[str, Any]:
    """Return all regimes of one model, and what it is."""
    work = Workload(model, options)
    # the base in eager mode, which every regime is held against too
    stock, fused = (Timed(work, ARMS[name], "eager") for name in ("base", "base, fused"))
    about = {
        "base": work.task.base.func.__name__,
        "rows": work.rows,
        "parameters": sum(p.numel() for p in stock.problem.model.parameters()),
        "channels last": work.memory is torch.channels_last,
    }
    regimes = {}
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):  # or it would run eagerly
        for regime in options.regimes:
            regimes[regime] = measure(work, arms, regime, stock, fused)
            print(table(model, regime, about, regimes[regime]), end="\n\n", flush=True)
    return {**about, "regimes": regimes}


def benchmark(arms: Mapping[str, Arm], options: Options, out: Path | None) -> None:
    """Measure what the options ask for and write the record, with a plot beside it."""
    chosen = {name: arms[name] for name in dict.fromkeys([*BASES, *options.methods])}
    record: dict[str, Any] = {
        "environment": about_this_run(options.device),
        "options": asdict(options),
        "note": counts.NOTE,
        "models": {model: measure_model(model, chosen, options) for model in options.models},
    }
    if out:
        write_record(out, record)
        draw(record, out.with_suffix(".png"))


@click.command("steps")
@step_options("resnet18,vit", ARMS, [name for name, arm in ARMS.items() if arm.is_default])
def command(options: Options, out: Path | None) -> None:
    """Time whole training steps of every method and baseline, side by side."""
    benchmark(ARMS, options, out)
