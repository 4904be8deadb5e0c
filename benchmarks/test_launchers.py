"""Every launcher on one real workload beside what torch has for it; on a GPU the Triton kernels, where there is one."""

import pytest
import torch

from benchmarks.kernels.run import KERNELS, plan_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = {
    **dict.fromkeys(("norm", "perturb_", "restore_sgd_step_", "restore_adam_step_", "ema_"), "resnet18"),
    "trajectory_loss": "256 x 1000",
    "select_largest_increase": "4096 rows",
}
REPEATS = {"trajectory_loss": 3, "select_largest_increase": 50}
MARGIN = 5.0
"""On the CPU both sides are torch's operations, and which of them it has vector code for differs by processor: with
AVX-512 switched off Adam's step takes 3.4 times as much of its reference's time."""


@pytest.mark.parametrize("name", CHOSEN)
def test_launcher(benchmark, beside, name):
    benchmark.group = f"{name}, {CHOSEN[name]}"
    kernel = KERNELS[name]
    ours, theirs = (kernel.make(kernel.workloads[CHOSEN[name]](), torch.float32, DEVICE, seed) for seed in range(2))
    call, torchs = kernel.ours(plan_for(DEVICE, 1).launchers, ours), next(iter(kernel.baselines.values()))(theirs)

    def waiting(run):
        def waited():
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return waited

    beside(waiting(call), waiting(torchs), REPEATS.get(name, 1), MARGIN)
