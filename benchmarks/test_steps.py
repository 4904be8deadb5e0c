"""Whole steps of the methods, base and eager SAM beside them, on the two smallest nets; on a GPU where there is one."""

import argparse

import pytest
import torch

from benchmarks.arms.ours import METHODS
from benchmarks.steps.run import Arm, Workload

OPTIONS = argparse.Namespace(
    device="cuda" if torch.cuda.is_available() else "cpu", rows=None, amp="off", channels_last="auto", compiler="eager"
)
CHOSEN = ("base", "davda54 eager sam", "sam", "esam", "msam, 4 shards", "saf", "mesa")


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_step(benchmark, model, method):
    benchmark.group = f"step, {model}"
    work = Workload(model, OPTIONS)
    arm = Arm(work, METHODS[method], "eager")

    def step():
        arm.step()
        work.wait()

    benchmark.pedantic(step, rounds=10, iterations=1)
