"""Writes the tables of README.md from the recorded results: python -m benchmarks.readme"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: written by `make readme` from benchmarks/results -->\n", "<!-- /results -->\n"


def accuracy_table() -> str:
    """What `make compare` found."""
    return (RECORDED / "compare_digits.md").read_text().strip()


STEPS = ("base", "base again", "davda54 eager sam", "sam", "esam", "msam, 4 shards", "saf", "mesa")


def step_table() -> str:
    """What each method's step costs beside the base optimizer's."""
    record = json.loads((RECORDED / "step_cpu.json").read_text())
    about = record["environment"]
    lines = ["| model | method | step | over base | over SAM |", "| --- | --- | --- | --- | --- |"]
    for model in ("resnet18", "vit"):
        for method in STEPS:
            row = record[model][method]
            numbers = f"{row['milliseconds']:.0f} ms | {row['over base']:.2f}x | {row['over sam']:.2f}x"
            lines.append(f"| {model} | {method} | {numbers} |")
    note = (
        f"Whole training steps on random 32x32 pictures, batch {record['options']['rows']}, medians of "
        f'{record["options"]["rounds"]} interleaved rounds; ESAM at beta 0.6, gamma 0.5; "base again" shows the noise. '
        f"{about['device']}, torch {about['torch']}. Recorded by `python -m benchmarks.step`."
    )
    return "\n".join([*lines, "", note])


def block() -> str:
    """Everything between README's markers."""
    return f"{accuracy_table()}\n\n{step_table()}\n"


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + block() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
