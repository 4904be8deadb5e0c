"""Bandwidth of every kernel, beside a copy by the same device and beside what else would do the same work.

    python -m benchmarks kernels                      on a machine with a GPU; records into benchmarks/results
    python -m benchmarks kernels --dry-run            all of it on the CPU, with the twins; times nothing

The kernels' tests run on the device first: where one is red nothing is timed. Every call is verified against the twin
in float64 on a small list before it may be timed, and a baseline that computes something else is refused by name.

Arms are interleaved, in an order that changes from round to round, our kernel twice: what its two arms differ by is
noise. An arm's sample is a block of calls that walk over copies of the inputs, together larger than the L2, while the
host runs ahead behind a few large copies, so that launches cost nothing unless a call has too many of them to hide. The
host's own time is a column of its own. Bytes are the kernel's minimum, whatever a baseline moves.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from benchmarks.arms.parameter_lists import LISTS
from benchmarks.counts import count_launches
from benchmarks.environment import ROOT, recorded
from benchmarks.harness import about_this_run, interleaved, names, out_option, over, rounds_option, write_record
from benchmarks.kernels import table
from benchmarks.kernels.losses import LOSSES
from benchmarks.kernels.table import Call, Kernel, UnavailableError, bytes_moved
from fastsam.kernels import ops, reference

KERNELS = {**table.KERNELS, **LOSSES}
OURS, AGAIN, TWIN = "ours", "ours again", "torch.compile of the twin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TESTS = {
    "cuda": [
        *(
            "kernels/test_kernels.py",
            "kernels/test_kernel_steps.py",
            "kernels/test_kernel_launches.py",
            "kernels/test_select.py",
        ),
        *("kernels/test_trajectory_loss.py", "kernels/test_ema.py", "graph/test_graph.py"),
    ],
    "cpu": ["kernels/test_reference.py"],
}
"""The tests of the kernels and of captured steps, and of the twins."""
_UNITS = 4  # in the last place of the dtype, root mean square
_MOST_LEAD = 0.02  # seconds


class Plan(NamedTuple):
    """Where and how often calls are measured."""

    device: str
    launchers: ModuleType
    rounds: int
    calls: int
    """At least so many in a block."""
    cache: int
    """Bytes that the copies of the inputs must exceed."""
    copied: int
    """Bytes that the yardstick copies: it moves twice as many."""
    compiler: str
    """Backend of torch.compile."""


def plan_for(device: str, rounds: int) -> Plan:
    if device == "cpu":
        return Plan(device, reference, rounds, 2, 0, 2**22, "eager")
    assert ops.uses_triton([torch.empty(0, device=device)])
    cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return Plan(device, ops, rounds, 20, cache, 2**30, "inductor")


def builders(kernel: Kernel, plan: Plan) -> dict[str, Any]:
    """Return what builds each arm's call on inputs."""

    def compiled(x: Any) -> Call:
        torch._dynamo.reset()  # past its limit of recompilations it would run the twin as it is
        return torch.compile(kernel.ours(reference, x), dynamic=False, backend=plan.compiler)

    def ours(x: Any) -> Call:
        return kernel.ours(plan.launchers, x)

    return {OURS: ours, AGAIN: ours, **kernel.baselines, TWIN: compiled}


def verify(kernel: Kernel, build: Any, dtype: torch.dtype, device: str) -> None:
    """Raise ArithmeticError unless a call computes on a small list what the twin does in float64."""
    for plant in (None, kernel.plant) if kernel.plant else (None,):
        x, original = (kernel.make(kernel.small, dtype, device, 1) for _ in range(2))
        exact = original.copy(torch.float64)
        for each in (x, original, exact):
            if plant:
                plant(each)
        found, truth = build(x)(), kernel.ours(reference, exact)()
        for i, (some, true) in enumerate(zip(found, truth, strict=True)):
            error, size = _distance(some, true), _distance(true, [torch.zeros_like(t) for t in true])
            if not error <= _UNITS * torch.finfo(dtype).eps * size:
                raise ArithmeticError(f"wrong numbers: result {i} is off by {error:.1e} of {size:.1e}")


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return float(sum(((a.double() - b.double()) ** 2).sum().item() for a, b in pairs) ** 0.5)


def prepare(kernel: Kernel, dtype: torch.dtype, copies: list[Any], plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each arm's calls, one for every copy of the inputs, and why other arms are not there.

    Raises:
        ArithmeticError: our own call is wrong.
    """
    arms: dict[str, list[Call]] = {}
    missing: dict[str, str] = {}
    for name, build in builders(kernel, plan).items():
        calls = _prepare_one(kernel, build, dtype, copies, plan.device, must_run=name in (OURS, AGAIN))
        if isinstance(calls, str):
            missing[name] = calls
        else:
            arms[name] = calls
    return arms, missing


def _prepare_one(
    kernel: Kernel, build: Any, dtype: torch.dtype, copies: list[Any], device: str, must_run: bool
) -> list[Call] | str:
    try:
        verify(kernel, build, dtype, device)
        calls = [build(x) for x in copies]
        for call in calls:
            call()
    except UnavailableError as reason:
        return str(reason)
    except Exception as error:  # a baseline may fail in any way, and is then reported
        if must_run:
            raise
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return calls


class Clock:
    """Times blocks of calls on one device."""

    def __init__(self, plan: Plan) -> None:
        self.is_cuda = plan.device != "cpu"
        n = plan.copied // 4
        self.source, self.target = torch.rand(n, device=plan.device), torch.empty(n, device=plan.device)
        self.copied = 2 * plan.copied

    def copy(self) -> None:
        self.target.copy_(self.source)

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def host(self, calls: Sequence[Any], n: int) -> float:
        """Seconds that the host needs for `n` calls; on the CPU that is all there is."""
        self.wait()
        start = time.perf_counter()
        for call in itertools.islice(itertools.cycle(calls), n):
            call()
        return time.perf_counter() - start

    def device(self, calls: Sequence[Any], n: int, lead: float) -> float:
        """Seconds that the device needs for `n` calls while the host has a lead."""
        if not self.is_cuda:
            return self.host(calls, n)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        until = lead
        while until > 0:
            self.copy()
            until -= self.copied / 8e12  # no device copies faster
        start.record()
        for call in itertools.islice(itertools.cycle(calls), n):
            call()
        end.record()
        self.wait()
        return start.elapsed_time(end) / 1e3


def measure(name: str, workload: str, dtype: str, plan: Plan, clock: Clock) -> dict[str, Any]:
    """Return one result of the record: a kernel on a workload in a dtype, arm by arm."""
    kernel = KERNELS[name]
    size = kernel.workloads[workload]()
    if plan.device == "cpu":
        size = kernel.cut(size)
    first = kernel.make(size, DTYPES[dtype], plan.device, 0)
    moved = bytes_moved(kernel, first, DTYPES[dtype])
    n_copies = max(2, -(-plan.cache // moved))
    copies = [first, *(kernel.make(size, DTYPES[dtype], plan.device, seed) for seed in range(1, n_copies))]
    calls, missing = prepare(kernel, DTYPES[dtype], copies, plan)
    n = -(-plan.calls // n_copies) * n_copies
    host = {arm: clock.host(some, n) / n for arm, some in calls.items()}
    arms: dict[str, Callable[[], float]] = {"copy": partial(clock.device, [clock.copy], 5, 0.0)}
    arms |= {arm: partial(clock.device, some, n, min(1.5 * host[arm] * n, _MOST_LEAD)) for arm, some in calls.items()}
    samples = interleaved(arms, plan.rounds)
    for x in copies:
        if not all(t.isfinite().all() for t in x.tensors()):
            raise ArithmeticError(f"{name} on {workload} in {dtype}: numbers grew until they were no longer finite")
    rate = 5 * clock.copied / statistics.median(samples.pop("copy")) / 1e9
    ours = samples[OURS]
    rows: dict[str, Any] = {
        arm: {
            **summary([t / n for t in times], moved, rate),
            "over ours": over(times, ours),
            "host microseconds": round(host[arm] * 1e6, 2),
            "launches": count_launches(calls[arm][0], plan.device),
        }
        for arm, times in samples.items()
    }
    rows |= {arm: {"not timed": reason} for arm, reason in missing.items()}
    about = {"kernel": name, "workload": workload, "dtype": dtype, "bytes": moved, "copies of the inputs": n_copies}
    return {**about, "copy GB/s": round(rate, 1), "arms": rows}


def summary(times: list[float], moved: int, rate: float) -> dict[str, float]:
    """Median, spread and bandwidth of samples in seconds, `rate` being the copy's in GB/s."""
    median = statistics.median(times)
    quarters = statistics.quantiles(times, n=4, method="inclusive")
    speed = moved / median / 1e9
    return {
        "microseconds": round(median * 1e6, 2),
        "interquartile range": round((quarters[2] - quarters[0]) * 1e6, 2),
        "GB/s": round(speed, 1),
        "share of copy": round(speed / rate, 3),
    }


def as_text(result: dict[str, Any]) -> str:
    """A result as lines of text."""
    head = f"{result['kernel']}, {result['workload']}, {result['dtype']}: {result['bytes'] / 1e6:.2f} MB"
    columns = f"{'us':>10} {'IQR':>8} {'GB/s':>8} {'of copy':>8} {'over ours':>9} {'launches':>8} {'host us':>9}"
    lines = [f"{head}, copy {result['copy GB/s']:.0f} GB/s", f"  {'':26} {columns}"]
    for arm, row in result["arms"].items():
        if "not timed" in row:
            lines.append(f"  {arm:26} not timed: {row['not timed']}")
            continue
        launches = "-" if row["launches"] is None else row["launches"]
        lines.append(
            f"  {arm:26} {row['microseconds']:10.1f} {row['interquartile range']:8.1f} {row['GB/s']:8.1f} "
            f"{row['share of copy']:8.1%} {row['over ours']:9.2f} {launches:>8} {row['host microseconds']:9.1f}"
        )
    return "\n".join(lines)


def tests_pass(device: str) -> bool:
    """Run the kernels' tests on the device; say which are red."""
    paths = [str(ROOT / "tests" / name) for name in TESTS[device]]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--device", device, *paths]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def cases(kernels: list[str], lists: list[str], dtypes: list[str]) -> Iterator[tuple[str, str, str]]:
    """Which kernel is measured on what; one that is not over parameters has workloads of its own, all of them."""
    for name in kernels:
        kernel = KERNELS[name]
        workloads = lists if kernel.workloads is LISTS else kernel.workloads
        known = [dtype for dtype in dtypes if DTYPES[dtype] in kernel.dtypes]
        yield from itertools.product([name], workloads, known)


def cannot_run() -> str | None:
    """Return why nothing can be measured on a GPU here, and the remedy."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use: run on a machine with one, or pass --dry-run"
    launchers = ops._triton_backend()
    if launchers is None:
        return "triton is not installed: install it, or pass --dry-run"
    return "TRITON_INTERPRET is set: unset it, or pass --dry-run" if launchers.INTERPRETED else None


@click.command("kernels")
@names("--kernels", "kernel", KERNELS, KERNELS)
@names("--lists", "list", LISTS, LISTS, "Parameters; a dry run takes the first.")
@names("--dtype", "dtype", DTYPES, DTYPES)
@rounds_option(None, least=2, about="Samples of each arm; 15, in a dry run 3.")
@click.option("--dry-run", is_flag=True, help="Run the references on the CPU, to see that all works.")
@out_option("JSON file for the results; a complete run on a GPU needs none.")
def command(
    kernels: list[str], lists: list[str], dtype: list[str], rounds: int | None, dry_run: bool, out: Path | None
) -> int:
    """Measure the bandwidth of every kernel beside a copy, and beside what else would do its work."""
    device = "cpu" if dry_run else "cuda"
    if not dry_run and (reason := cannot_run()):
        print(f"kernels: {reason}", file=sys.stderr)
        return 2
    if not tests_pass(device):
        print(f"kernels: tests are red on {device}: nothing is timed", file=sys.stderr)
        return 1
    about = about_this_run(device)
    is_complete = (kernels, lists, dtype) == (list(KERNELS), list(LISTS), list(DTYPES))
    plan = plan_for(device, rounds or (3 if dry_run else 15))
    clock, results = Clock(plan), []
    for case in cases(kernels, lists[:1] if dry_run else lists, dtype):
        results.append(measure(*case, plan, clock))
        print("DRY RUN of cut lists, times mean nothing: " * dry_run + as_text(results[-1]), end="\n\n", flush=True)
    if out is None and is_complete and not dry_run:
        out = recorded("kernels", about["device"])
    if out is None:
        print("nothing recorded: " + ("a dry run" if dry_run else "not all was measured; pass --out"))
        return 0
    write_record(out, {"environment": about, "dry run": dry_run, "results": results})
    print(f"recorded in {out}")
    return 0
