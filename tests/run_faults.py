"""Cut thousands of steps short, in all methods, bases and ways, and write figures as JSON (`make test-faults`)."""

import argparse
import json
import platform
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "helpers"), str(HERE / "common")]

from fault_runs import MEND, StepsCutShort  # noqa: E402
from laws import all_cells, takes_plain_steps  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=5000, help="planted faults, single ones and pairs")
    parser.add_argument("--signals", type=int, default=500, help="SIGINTs, sent by a timer")
    parser.add_argument("--seed", type=int, default=0, help="of where they hit")
    parser.add_argument("--out", type=Path, default=Path("build/faults.json"), help="where the figures go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng, start, outcomes, wrong = random.Random(options.seed), time.time(), Counter(), []
    cells = [cell for cell in all_cells() if not takes_plain_steps(cell)]
    places = [(cell, taken) for cell in cells for taken in (0, 3)]
    done = {"faults": 0, "signals": 0, "signals that came in time": 0}
    for i, (cell, taken) in enumerate(places):
        steps = StepsCutShort(cell, taken)
        seconds = steps.seconds()
        # so that the last place ends at the number that was asked for
        while done["faults"] * len(places) < options.faults * (i + 1):
            done["faults"] += 1
            then = rng.choice((0, 0, 1, 2, 3, rng.randint(4, 40)))
            n, error = rng.randint(1, steps.calls), rng.choice((KeyboardInterrupt, MemoryError))
            steps = attempt(wrong, steps, steps.plant, n, then, error, rng.choice(MEND) if then else None)
        outcomes += Counter({f"fault: {name}": count for name, count in steps.outcomes.items()})
        steps.outcomes.clear()
        while done["signals"] * len(places) < options.signals * (i + 1):
            done["signals"] += 1
            before = steps.outcomes.total()
            steps = attempt(wrong, steps, steps.send_signal, rng.uniform(0, 1.1) * seconds)
            done["signals that came in time"] += steps.outcomes.total() > before
        outcomes += Counter({f"signal: {name}": count for name, count in steps.outcomes.items()})
        print(f"{i + 1}/{len(places)} {cell}, {taken} steps before: {len(wrong)} wrong", flush=True)
    figures = {
        **done,
        "cells": len(cells),
        "outcomes": dict(outcomes),
        "neither before nor after": wrong,
        "seed": options.seed,
        "seconds": round(time.time() - start),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 1 if wrong else 0


def attempt(wrong, steps, cut_short, *arguments):
    """Cut a step short; where that has left something else, note it and go on with a new training."""
    try:
        cut_short(*arguments)
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {error}")
        print(wrong[-1], flush=True)
        return StepsCutShort(steps.cell, steps.saved["taken"])
    return steps


if __name__ == "__main__":
    sys.exit(main())
