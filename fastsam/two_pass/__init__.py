"""The engine of one step: two passes, and weights that always come back."""

from fastsam.two_pass.optimizer import TwoPassOptimizer

__all__ = ["TwoPassOptimizer"]
