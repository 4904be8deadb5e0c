"""GPU gate: correctness, bandwidth of the kernels and time of whole steps, beside what was recorded for this GPU.

    python -m benchmarks gate gpu              2 without a GPU, 1 where a test or a comparison is red, else 0
    python -m benchmarks gate gpu --record     records what it finds in place of what was recorded

Runs `python -m benchmarks kernels`, which runs the kernels' tests first and times nothing where one is red, and
`python -m benchmarks steps` on the large models in all regimes. Both are compared with benchmarks/results; where
nothing is recorded for this GPU, what was found is recorded. Only ratios taken within one run are compared, so that a
slower clock or another driver alone turns nothing red.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click
import torch

from benchmarks.arms.ours import ARMS
from benchmarks.environment import ROOT, recorded
from benchmarks.harness import write_record
from benchmarks.kernels.run import OURS, cannot_run

KERNEL_MARGIN = 0.10
"""By how much a kernel's share of the copy bandwidth may fall: one access of an element more than the seven of the
Adam step, the longest, takes 12.5 % of it, and of the others more."""
KERNEL_FLOOR = 0.02
"""What a fall has to exceed besides: a call on a hundred rows moves next to nothing, and its share is rounding."""
STEP_MARGIN = 0.05
"""By how much a step's ratio over the base may rise. One forward more in a SAM step is 17 %. The base's own noise,
which stands in every record, is to be well below this; it is not known for any GPU yet."""
STEPS = [
    "--models", "resnet18,resnet50,vit_s16", "--regimes", "eager,compiled,graph", "--amp", "bf16",
    "--rounds", "5", "--steps", "50", "--device", "cuda", "--methods", ",".join(
        name.replace(",", "+") for name, arm in ARMS.items() if arm.is_default or name == "esam, elements"
    ),
]  # fmt: skip
"""ESAM's element mask beside every method's default, since it alone of ESAM's can be compiled."""
FRESH = ROOT / "runs" / "bench-gpu"

Values = dict[str, float]


class Kind(NamedTuple):
    """One benchmark of the gate."""

    command: str
    """Of `python -m benchmarks`."""
    arguments: Sequence[str]
    values: Callable[[Mapping[str, Any]], Values]
    """The figures of a record that are compared, by what they are of."""
    margin: float
    """Relative; the share may fall, or the ratio rise, by so much."""
    floor: float
    """Absolute; less is no change."""
    higher_is_better: bool


def kernel_values(record: Mapping[str, Any]) -> Values:
    """Shares of the copy bandwidth."""
    return {
        f"{result['kernel']}, {result['workload']}, {result['dtype']}": result["arms"][OURS]["share of copy"]
        for result in record["results"]
    }


def step_values(record: Mapping[str, Any]) -> Values:
    """Our methods' ratios over the stock base, and over the base of their regime."""
    return {
        f"{model}, {regime}, {name}, {over}": row[over]
        for model, of_model in record["models"].items()
        for regime, found in of_model["regimes"].items()
        for name, row in found["arms"].items()
        for over in ("over stock", "over base")
        if name in ARMS and ARMS[name].is_ours
    }


KINDS = {
    "kernels": Kind("kernels", [], kernel_values, KERNEL_MARGIN, KERNEL_FLOOR, True),
    "steps": Kind("steps", STEPS, step_values, STEP_MARGIN, 0.0, False),
}


def compare(kind: Kind, fresh: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what is red, and what is new."""
    found, known = kind.values(fresh), kind.values(old)
    red = [f"{name}: is gone" for name in known if name not in found]
    for name in (name for name in known if name in found):
        worse = known[name] - found[name] if kind.higher_is_better else found[name] - known[name]
        if worse > max(kind.floor, kind.margin * known[name]):
            change = found[name] / known[name] - 1
            red.append(f"{name}: {found[name]:.3f}, recorded {known[name]:.3f} ({change:+.1%})")
    return red, [name for name in found if name not in known]


def measured(name: str, kind: Kind) -> dict[str, Any] | None:
    """Run a benchmark in a process of its own, whose memory the next one finds free; None if it failed."""
    out = FRESH / f"{name}.json"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", kind.command, *kind.arguments, "--out", str(out)], cwd=ROOT
    )
    return json.loads(out.read_text()) if done.returncode == 0 else None


def judge(name: str, kind: Kind, fresh: dict[str, Any], device: str, record: bool) -> bool:
    """Compare with what is recorded, or record; say what came of it and return whether it is green."""
    path = recorded(name, device)
    if record or not path.exists():
        write_record(path, fresh)
        print(f"gate gpu: {name}: {'' if record else 'nothing was recorded for this GPU; '}recorded in {path}")
        return True
    red, new = compare(kind, fresh, json.loads(path.read_text()))
    for line in new:
        print(f"gate gpu: new, not compared: {line}")
    for line in red:
        print(f"gate gpu: RED: {line}")
    print(f"gate gpu: {name}: {'RED' if red else 'ok'} beside {path.name}, margin {kind.margin:.0%}")
    return not red


@click.command("gpu")
@click.option("--record", is_flag=True, help="Record what is found in place of what was.")
def command(record: bool) -> int:
    """Hold the kernels' bandwidth and whole steps against what was recorded for this GPU."""
    if reason := cannot_run():
        print(f"gate gpu: {reason.split(', or pass')[0]}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    green = True
    for name, kind in KINDS.items():
        fresh = measured(name, kind)
        if fresh is None:
            print(f"gate gpu: {kind.command} failed: what follows is not measured", file=sys.stderr)
            return 1
        green &= judge(name, kind, fresh, device, record)
    return int(not green)
