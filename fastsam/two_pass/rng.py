"""The state of torch's random number generators, for drawing the same dropout masks in both passes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastsam.two_pass import capture


class RandomState:
    """States of the CPU's generator and of those of the given CUDA devices, at the time of construction."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._recorder = capture.recorder()
        self._mark = None if self._recorder is None else self._recorder.mark()
        self._cpu: Tensor | None = None
        self._cuda: dict[torch.device, Tensor] = {}
        # A capture has generator states of its own, which may not be read while it runs.
        if capture.current() is None:
            self._cpu = torch.get_rng_state()
            self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}

    def set(self) -> None:
        """Put the generators into these states."""
        if self._recorder is not None:
            self._recorder.rewind(self._mark)
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
