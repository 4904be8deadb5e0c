"""Checks of a training loop of one's own: `check_step` holds one step of it against the method's equations."""

from fastsam.testing.check_step import StepReport, check_step

__all__ = ["StepReport", "check_step"]
