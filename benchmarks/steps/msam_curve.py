"""What mSAM's step costs as the shards grow in number and shrink, one after the other and side by side.

    python -m benchmarks msam-curve --models resnet18,vit --out benchmarks/results/msam_curve_cpu.json

Arms, ratios, noise and options are those of `python -m benchmarks steps`.
"""

from pathlib import Path

import click

from benchmarks.arms.ours import ARMS, own_arm
from benchmarks.steps import run
from benchmarks.steps.options import Options, step_options

SHARDS = [1, 2, 4, 8, 16, 32]
CURVE = {f"msam {m}": own_arm("msam", num_shards=m) for m in SHARDS}
CURVE |= {f"msam {m}, batched": own_arm("msam", "batched", num_shards=m) for m in SHARDS}
CHOICES = {name: ARMS[name] for name in (*run.BASES, "sam")} | CURVE


@click.command("msam-curve")
# batch norm takes two rows in a shard
@step_options("resnet18,vit", CHOICES, CHOICES, rows=2 * max(SHARDS), steps=1)
def command(options: Options, out: Path | None) -> None:
    """Time mSAM's step by the number of its shards, one after the other and side by side."""
    run.benchmark(CHOICES, options, out)
