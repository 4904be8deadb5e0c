"""Running statistics that only the first pass of a step may move."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


class RunningStatistics:
    """Keeps the running statistics of a model's batch-norm layers to one forward of a step.

    A step that ends well leaves them as its first pass did; a step that fails, as they were before it. Copying them
    back after a further pass, rather than switching its update off, works for momentum=None, counts
    `num_batches_tracked` once, and leaves compiled models alone.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, _NormBase)] if model is not None else []
        self._before_step: _Copies | None = None
        self._after_first: _Copies | None = None

    def any_training(self) -> bool:
        """Whether a layer normalises by the statistics of its batch, which takes two rows."""
        batch_norms = (layer for layer in self.layers if isinstance(layer, _BatchNorm))
        return any(layer.training or layer.running_mean is None for layer in batch_norms)

    def any_cumulative(self) -> bool:
        """Whether a layer would move its statistics by how many batches it has seen (momentum=None)."""
        return any(layer.training and layer.track_running_stats and layer.momentum is None for layer in self.layers)

    def moving(self) -> list[Tensor]:
        """The statistics, and their counters, of every layer that would update them now."""
        return [
            buffer
            for layer in self.layers
            if layer.training and layer.track_running_stats
            for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
            if buffer is not None
        ]

    def begin(self) -> None:
        """Copy the statistics that a step starts from; of a step with several pairs only the first call counts."""
        if self._before_step is None and self.layers:
            self._before_step = _Copies(self.moving())

    def save(self) -> None:
        """Copy the statistics that the first pass has left."""
        if self.layers:
            self._after_first = _Copies(self.moving())

    def put_back(self) -> None:
        """Undo what happened to the statistics since `save`. Idempotent."""
        if self._after_first is not None:
            self._after_first.put_back()
            self._after_first = None

    def rewind(self) -> None:
        """Undo what happened to the statistics since `begin`, or `save` where nothing began. Idempotent."""
        self.put_back()
        if self._before_step is not None:
            self._before_step.put_back()
        self.end()

    def end(self) -> None:
        """Let the statistics be what they are."""
        self._before_step = self._after_first = None


class _Copies:
    """Buffers and what they held. It is made at once, so an interrupt finds all of it or nothing."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers, self._values = buffers, [buffer.clone() for buffer in buffers]

    def put_back(self) -> None:
        _copy_all(self._buffers, self._values)


class MeanUpdate:
    """Makes one update of running statistics out of several forward passes, all of which start from the same ones.

    A running statistic is linear in that of the batch, r <- (1 - mu) r + mu s. So the mean of what the passes leave is
    one update with the mean of their s, whatever mu is (momentum=None too), and no layer has to be asked for its s.

    Args:
        buffers: statistics, and integer counters, which count the one update.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._statistics = [b for b in buffers if b.is_floating_point()]
        self._counters = [b for b in buffers if not b.is_floating_point()]
        self._buffers = self._statistics + self._counters
        self._start = [b.clone() for b in self._buffers]
        # 16 bits are too few for a sum
        self._means = [torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32)) for b in self._statistics]
        self._counts = [b.clone() for b in self._counters]

    def add(self, weight: float) -> None:
        """Take in what a pass has left, and rewind for the next one. The weights of all passes add up to 1."""
        for mean, left in zip(self._means, self._statistics, strict=True):
            mean.add_(left, alpha=weight)
        for count, left in zip(self._counts, self._counters, strict=True):
            # Not every pass runs every layer.
            torch.maximum(count, left, out=count)
        self.rewind()

    def rewind(self) -> None:
        """Go back to the statistics of the start."""
        _copy_all(self._buffers, self._start)

    def finish(self) -> None:
        """Leave the mean in the buffers."""
        _copy_all(self._buffers, self._means + self._counts)


def set_to_means(buffers: list[Tensor], stacked: list[Tensor]) -> None:
    """Set statistics to the means of their stacks over the first dimension, and counters to the largest."""
    _copy_all(buffers, [s.mean(0) if s.is_floating_point() else s.amax(0) for s in stacked])


@torch.no_grad()
def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
