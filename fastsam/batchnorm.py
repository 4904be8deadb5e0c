"""Running statistics that only the first pass of a step may move (SPEC: pass 1 updates, later passes do not)."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Saves and puts back the running statistics of a model's batch-norm layers around a further pass.

    Copying them back after the pass's backward, rather than switching the update off, works for momentum=None, counts
    `num_batches_tracked` once, and leaves compiled models alone.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, _NormBase)] if model is not None else []
        self._saved: list[tuple[Tensor, Tensor]] = []

    def any_training(self) -> bool:
        """Whether a layer normalises by the statistics of its batch, which takes two rows."""
        return any(layer.training or layer.running_mean is None for layer in self.layers)

    @torch.no_grad()
    def save(self) -> None:
        """Copy the statistics of every layer that would update them now."""
        buffers = [
            buffer
            for layer in self.layers
            if layer.training and layer.track_running_stats
            for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
            if buffer is not None
        ]
        self._saved = [(buffer, buffer.clone()) for buffer in buffers]

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what happened to the statistics since `save`. Idempotent."""
        for buffer, saved in self._saved:
            buffer.copy_(saved)
        self._saved = []
