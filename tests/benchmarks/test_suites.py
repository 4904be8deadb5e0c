"""The suites of pytest-benchmark: each is in the record, and a step that became slower turns them red."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(ROOT)
    from benchmarks import conftest as suites
    from benchmarks import test_launchers, test_optimizer_side, test_steps

RECORD = json.loads((ROOT / "benchmarks" / "results" / "suites_cpu.json").read_text())["ratios"]


def names(test):
    """Names of a test's cases, as pytest makes them of its marks."""
    cases = [""]
    for mark in test.pytestmark:
        if mark.name == "parametrize":
            cases = [f"{case}-{value}".removeprefix("-") for value in mark.args[1] for case in cases]
    return {f"{test.__name__.removeprefix('test_')}[{case}]" for case in cases}


def test_the_record_holds_every_suite_and_no_other():
    tests = (test_steps.test_step, test_launchers.test_launcher, test_optimizer_side.test_optimizer_side)
    assert set().union(*map(names, tests)) == set(RECORD)


@pytest.mark.parametrize(
    ("ratio", "margin", "verdict"),
    [
        (2.0, 1.5, None),
        (2.99, 1.5, None),
        (3.01, 1.5, "a takes 3.01 times its reference's time, recorded 2.00, accepted 1.5 times that"),
        (3.01, 5.0, None),
    ],
)
def test_a_ratio_beside_the_record(ratio, margin, verdict):
    assert suites.too_slow("a", ratio, {"a": 2.0}, margin) == verdict


def test_what_is_not_recorded_is_red():
    assert suites.too_slow("b", 1.0, {"a": 2.0}) == "b is not in the record: make bench ARGS=--renew"


@pytest.mark.parametrize(("plant", "status"), [("-p slowed_steps", 1), ("", 0)])
def test_a_second_pass_run_three_times_turns_a_suite_red(plant, status):
    arguments = ["benchmarks/test_steps.py", "-q", "--benchmark-only", "-k", "cnn-sam]", *plant.split()]
    # a worker of pytest-xdist times nothing
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == status, found.stdout + found.stderr
    assert ("step[cnn-sam] takes" in found.stdout) == bool(status)
