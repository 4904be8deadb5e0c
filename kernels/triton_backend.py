"""The Triton launchers, under the names of the reference implementations. Needs triton; only ops.py imports it."""

from fastsam.kernels.ema import ema_calls
from fastsam.kernels.launch_tables import INTERPRETED, runs_here, split
from fastsam.kernels.norm import found_nonfinite, norm
from fastsam.kernels.perturb import perturb_
from fastsam.kernels.restore_adam_step import adam_step_calls
from fastsam.kernels.restore_step import restore_calls, sgd_step_calls
from fastsam.kernels.select import select_largest_increase
from fastsam.kernels.trajectory_loss import record_, trajectory_loss

__all__ = [
    "INTERPRETED",
    "adam_step_calls",
    "ema_calls",
    "found_nonfinite",
    "norm",
    "perturb_",
    "record_",
    "restore_calls",
    "runs_here",
    "select_largest_increase",
    "sgd_step_calls",
    "split",
    "trajectory_loss",
]
