"""No argument that changes from step to step compiles a kernel anew."""

import os
import subprocess
import sys

import pytest
from kernel_cases import kernels

# Kernels are compiled for a GPU that is not there, and not run: whatever Triton's launch path reads of one is made up.
SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Absent:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Absent())

from fastsam.kernels import launch, launch_tables, ops, triton_backend
from fastsam.kernels.philox import Draw
from fastsam.kernels.reference import AdamOptions, SGDOptions
from fastsam.kernels.tensor_list import Backup

compiled = {}

def compile_only(kernel, n_programs, *args, enable_fp_fusion=True, **constants):
    key = kernel.__name__, str(sorted(constants.items(), key=str))
    compiled.setdefault(key, set()).add(
        kernel.warmup(*args, grid=(n_programs,), num_warps=8, enable_fp_fusion=enable_fp_fusion, **constants).hash
    )

context = launch.observed_by(compile_only)
context.__enter__()
launch_tables.runs_here = lambda *tensors: True
ops._pick = lambda tensors: triton_backend
scalars = torch.ones(8, dtype=torch.float64), torch.ones(8)
for step, (n, odd) in enumerate([(1, 0), (16, 0), (5000, 1), (2**17, 1)]):
    weights, grads, means, squares = ([torch.ones(n + odd)[odd:]] for _ in range(4))
    length, scalar = scalars[0][step], scalars[1][step]  # not always aligned to 16 bytes
    ops.norm(grads)
    backup = Backup(weights)
    numbers = Draw(seed=2 ** (15 * step) - 1, step=16 * step, indices=(step,), keep_probability=(0.5,))
    ops.perturb_(weights, grads, backup, length, [0.1 * step], None, numbers)
    ops.found_nonfinite(grads)
    lists = weights, backup.tensors, grads, means
    ops.restore_sgd_step_(*lists, [SGDOptions(0.1 * step, 0.9)], grad_scale=scalar, found_inf=scalar)
    adam = [AdamOptions(0.1 * step)]
    ops.restore_adam_step_(*lists, squares, [None], [torch.ones(())], adam, found_inf=scalar)
    ops.restore_(backup)
print(len(compiled), max(map(len, compiled.values())))
"""


@pytest.mark.skipif(kernels is None, reason="triton is not installed")
def test_arguments_do_not_recompile():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["7", "1"], done.stderr
