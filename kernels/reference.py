"""The reference implementations in plain torch: path of the CPU, oracle of the tests, baseline of the benchmarks."""

from fastsam.kernels.past import Past
from fastsam.kernels.reference_ema import ema_, ema_calls
from fastsam.kernels.reference_norm import found_nonfinite, norm
from fastsam.kernels.reference_perturb import E0, perturb_
from fastsam.kernels.reference_restore_adam_step import AdamOptions, adam_step_calls, restore_adam_step_
from fastsam.kernels.reference_restore_step import (
    SGDOptions,
    restore_,
    restore_calls,
    restore_sgd_step_,
    sgd_step_calls,
)
from fastsam.kernels.reference_select import select_largest_increase
from fastsam.kernels.reference_trajectory_loss import record_, trajectory_loss

__all__ = [
    "E0",
    "AdamOptions",
    "Past",
    "SGDOptions",
    "adam_step_calls",
    "ema_",
    "ema_calls",
    "found_nonfinite",
    "norm",
    "perturb_",
    "record_",
    "restore_",
    "restore_adam_step_",
    "restore_calls",
    "restore_sgd_step_",
    "select_largest_increase",
    "sgd_step_calls",
    "trajectory_loss",
]
