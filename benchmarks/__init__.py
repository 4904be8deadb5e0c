"""Benchmarks of fastsam; not part of the installed package. `python -m benchmarks --help` lists the commands."""

import sys

FORMER = {
    "benchmarks.step": "steps",
    "benchmarks.steps": "steps",
    "benchmarks.steps.run": "steps",
    "benchmarks.msam_curve": "msam-curve",
    "benchmarks.steps.msam_curve": "msam-curve",
    "benchmarks.overlap": "overlap",
    "benchmarks.steps.overlap": "overlap",
    "benchmarks.kernels": "kernels",
    "benchmarks.kernels.run": "kernels",
    "benchmarks.static_gate": "gate static",
    "benchmarks.gates.static": "gate static",
    "benchmarks.count_gate": "gate count",
    "benchmarks.gates.count": "gate count",
    "benchmarks.cpu_gate": "gate cpu",
    "benchmarks.gates.cpu": "gate cpu",
    "benchmarks.gpu_gate": "gate gpu",
    "benchmarks.gates.gpu": "gate gpu",
    "benchmarks.readme": "readme",
}
"""What `python -m` was once followed by, and the command that it is now."""

# argv starts with "-m" while Python looks for the module that it is to run, and imports its package for that
if sys.argv[:1] == ["-m"]:
    for _word in sys.orig_argv[1:]:
        if (_name := _word.removeprefix("-m")) in FORMER:
            print(f"{_name} is now: python -m benchmarks {FORMER[_name]}", file=sys.stderr)
            sys.exit(2)
