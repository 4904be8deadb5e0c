"""What mSAM's step costs as the shards grow in number and shrink, one after the other and side by side.

    python -m benchmarks.msam_curve --models resnet18,vit --out benchmarks/results/msam_curve_cpu.json

Arms are interleaved, ratios taken and the noise shown by a second arm of the base optimizer as in `benchmarks.step`.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MODELS
from benchmarks.step import METHODS, Arm, environment, ours
from fastsam import MSAM

SHARDS = [1, 2, 4, 8, 16, 32]
CURVE = {f"msam {m}": partial(ours, partial(MSAM, num_shards=m)) for m in SHARDS}
CURVE |= {f"msam {m}, batched": partial(ours, partial(MSAM, num_shards=m, execution="batched")) for m in SHARDS}


def measure(model: str, rows: int, rounds: int, steps: int, device: str) -> dict[str, dict[str, Any]]:
    """Return each arm's median step in milliseconds, its spread, and its ratios to the base optimizer and to SAM."""
    builders = {method: METHODS[method] for method in ("base", "base again", "sam")} | CURVE
    arms = {method: Arm(model, build, rows, device) for method, build in builders.items()}
    for arm in arms.values():
        arm.step()
    order = list(arms)
    for i in range(rounds):
        random.Random(i).shuffle(order)
        for method in order:
            arms[method].time(steps)

    def ratio(arm: Arm, other: Arm) -> float:
        return round(statistics.median(t / o for t, o in zip(arm.times, other.times, strict=True)), 3)

    return {
        method: {
            "milliseconds": round(statistics.median(arm.times) * 1e3, 2),
            "spread": [round(min(arm.times) * 1e3, 2), round(max(arm.times) * 1e3, 2)],
            "over base": ratio(arm, arms["base"]),
            "over sam": ratio(arm, arms["sam"]),
        }
        for method, arm in arms.items()
    }


def table(model: str, results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{model:20} {'ms':>9} {'over base':>10} {'over SAM':>9}"]
    lines += [
        f"{method:20} {row['milliseconds']:9.1f} {row['over base']:10.3f} {row['over sam']:9.3f}"
        for method, row in results.items()
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,vit", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rows", type=int, default=2 * max(SHARDS), help="batch size; batch norm takes 2 in a shard")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps of an arm in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {
        "environment": environment(options.device),
        "options": {k: str(v) for k, v in vars(options).items() if k != "out"},
    }
    for model in options.models.split(","):
        record[model] = measure(model, options.rows, options.rounds, options.steps, options.device)
        print(table(model, record[model]), end="\n\n", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
