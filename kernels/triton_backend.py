"""The Triton launchers, under the names of the reference implementations. Needs triton; only ops.py imports it."""

from fastsam.kernels.ema import ema_
from fastsam.kernels.launch_tables import INTERPRETED, runs_here, split
from fastsam.kernels.norm import found_nonfinite, norm
from fastsam.kernels.perturb import perturb_
from fastsam.kernels.restore_adam_step import restore_adam_step_
from fastsam.kernels.restore_step import restore_, restore_sgd_step_
from fastsam.kernels.select import select_largest_increase
from fastsam.kernels.trajectory_loss import record_, trajectory_loss

__all__ = [
    "INTERPRETED",
    "ema_",
    "found_nonfinite",
    "norm",
    "perturb_",
    "record_",
    "restore_",
    "restore_adam_step_",
    "restore_sgd_step_",
    "runs_here",
    "select_largest_increase",
    "split",
    "trajectory_loss",
]
