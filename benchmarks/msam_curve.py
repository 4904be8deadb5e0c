"""What mSAM's step costs as the shards grow in number and shrink, beside SAM and the base optimizer.

    python -m benchmarks.msam_curve --models resnet18,vit --rows 64 --out benchmarks/results/msam_curve_cpu.json

Arms, rounds, ratios and the noise's own arm are those of `benchmarks.step`.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MODELS
from benchmarks.step import METHODS, environment, measure, table
from fastsam import MSAM

SHARDS = [1, 2, 4, 8, 16, 32]
CURVE = {f"msam {m}": partial(MSAM, num_shards=m) for m in SHARDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet18,vit", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rows", type=int, default=2 * max(SHARDS), help="batch size; batch norm takes 2 in a shard")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps of an arm in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    METHODS.update(CURVE)
    record: dict[str, Any] = {
        "environment": environment(options.device),
        "options": {k: str(v) for k, v in vars(options).items()},
    }
    for model in options.models.split(","):
        methods = ["sam", *CURVE]
        record[model] = measure(model, methods, options.rows, options.rounds, options.steps, options.device)
        print(table(model, record[model]), end="\n\n", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
