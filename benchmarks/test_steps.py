"""Whole steps of every method of the table beside the base's, on the two smallest nets; on a GPU where there is one."""

from functools import cache

import pytest
import torch

from benchmarks.arms.ours import ARMS
from benchmarks.steps.options import Options
from benchmarks.steps.run import Timed, Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = ["davda54 eager sam", *(name for name, arm in ARMS.items() if arm.is_ours and arm.is_default)]


@cache
def workload(model):
    return Workload(model, Options([model], [], [], device=DEVICE, compiler="eager"))


@pytest.mark.parametrize("method", [name for name in CHOSEN if not name.startswith("base")])
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_step(benchmark, beside, model, method):
    benchmark.group = f"step, {model}"
    work, period = workload(model), ARMS[method].period
    arm, base = (Timed(work, ARMS[name], "eager") for name in (method, "base"))

    def step(timed):
        for _ in range(period):
            timed.step()
        work.wait()

    beside(lambda: step(arm), lambda: step(base))
