"""Writes the tables of README.md from the recorded results: python -m benchmarks readme"""

import json
from collections.abc import Mapping
from typing import Any

import click

from benchmarks.arms.ours import ARMS
from benchmarks.environment import RECORDED, ROOT
from fastsam.cli.files import write_text

BEGIN, END = "<!-- results: written by `make readme` from benchmarks/results -->\n", "<!-- /results -->\n"
BASES = ("base", "base again", "base, fused")
BESIDE = "davda54 eager sam"
OURS = [name for name, arm in ARMS.items() if arm.is_ours and name not in BASES]
"""Every method of the table and its variants; README shows those that were recorded."""
STEPS = ("base", "base again", BESIDE, *OURS)
ON_CPU = ("resnet18", "vit")
KERNELS = ("norm", "perturb_", "restore_sgd_step_", "restore_adam_step_")
NOT_YET = "GPU: not measured yet; `make bench-gpu` measures and records."


def accuracy_table() -> str:
    """What `make compare` found."""
    return (RECORDED / "compare_digits.md").read_text().strip()


def step_table(record: Mapping[str, Any]) -> str:
    """What each method's eager step costs beside the base optimizer's."""
    lines = ["| model | method | step | over base |", "| --- | --- | --- | --- |"]
    for model in (name for name in ON_CPU if name in record["models"]):
        arms = record["models"][model]["regimes"]["eager"]["arms"]
        for method in (name for name in STEPS if name in arms):
            row = arms[method]
            lines.append(f"| {model} | {method} | {row['milliseconds']:.0f} ms | {row['over base']:.2f}x |")
    about = record["environment"]
    note = (
        f"Whole training steps on random pictures, batch {_rows(record)}, medians of "
        f'{record["options"]["rounds"]} interleaved rounds; ESAM at beta 0.6, gamma 0.5; "base again" shows the noise. '
        f"{about['device']}, torch {about['torch']}. Recorded by `python -m benchmarks steps`, with more methods "
        "and models in [step_cpu.json](benchmarks/results/step_cpu.json)."
    )
    return "\n".join([*lines, "", note])


def _rows(record: Mapping[str, Any]) -> str:
    return ", ".join(str(rows) for rows in dict.fromkeys(model["rows"] for model in record["models"].values()))


def gpu_steps(record: Mapping[str, Any]) -> str:
    """What each method costs beside its base in every regime, and its captured step beside the stock eager base."""
    lines = ["| model | method | eager | compiled | graph | graph over stock eager base |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, model in record["models"].items():
        recorded = {method for found in model["regimes"].values() for method in found["arms"]}
        for method in (method for method in (BESIDE, *OURS) if method in recorded):
            cells = [_ratio(model, regime, method, "over base") for regime in ("eager", "compiled", "graph")]
            cells.append(_ratio(model, "graph", method, "over stock"))
            lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    about = record["environment"]
    note = (
        f"Step time over the base optimizer's in the same regime. {about['device']}, torch {about['torch']}, amp "
        f"{record['options']['amp']}, batch {_rows(record)}. Recorded by `make bench-gpu`."
    )
    return "\n".join([*lines, "", note])


def _ratio(model: Mapping[str, Any], regime: str, method: str, over: str) -> str:
    row = model["regimes"].get(regime, {"arms": {}})["arms"].get(method)
    return "-" if row is None else f"{row[over]:.2f}x"


def gpu_kernels(record: Mapping[str, Any]) -> str:
    """How near the kernels come to a copy, on ResNet-50's list in float32."""
    shares = {
        result["kernel"]: result["arms"]["ours"]["share of copy"]
        for result in record["results"]
        if (result["workload"], result["dtype"]) == ("resnet50", "fp32") and result["kernel"] in KERNELS
    }
    words = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return f"Kernels on ResNet-50's parameters, as shares of a copy: {words} ({record['environment']['device']})."


def gpu_block() -> str:
    """What was recorded on GPUs, or that nothing was."""
    records = [(path.name, json.loads(path.read_text())) for path in sorted(RECORDED.glob("*.json"))]
    parts = [gpu_steps(record) for name, record in records if name.startswith("steps_")]
    parts += [gpu_kernels(record) for name, record in records if name.startswith("kernels_")]
    return "\n\n".join(parts) or NOT_YET


def block() -> str:
    """Everything between README's markers."""
    steps = json.loads((RECORDED / "step_cpu.json").read_text())
    return f"{accuracy_table()}\n\n{step_table(steps)}\n\n{gpu_block()}\n"


@click.command("readme")
def command() -> None:
    """Write README's tables anew from the recorded results."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    write_text(readme, before + BEGIN + block() + END + rest.split(END)[1])
