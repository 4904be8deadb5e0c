"""Every launcher on one real workload: the CPU twins, or the Triton kernels on a GPU where there is one."""

import pytest
import torch

from benchmarks.kernels.run import KERNELS, plan_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = {
    **dict.fromkeys(("norm", "perturb_", "restore_sgd_step_", "restore_adam_step_", "ema_"), "resnet18"),
    "trajectory_loss": "256 x 1000",
    "select_largest_increase": "4096 rows",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_launcher(benchmark, name):
    benchmark.group = f"{name}, {CHOSEN[name]}"
    kernel = KERNELS[name]
    call = kernel.ours(
        plan_for(DEVICE, 1).launchers, kernel.make(kernel.workloads[CHOSEN[name]](), torch.float32, DEVICE, 0)
    )

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, iterations=1, warmup_rounds=3)
