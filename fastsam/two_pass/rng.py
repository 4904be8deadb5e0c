"""The state of random number generators, for drawing the same numbers, as of dropout masks, in both passes."""

import ctypes
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.two_pass import capture

_MT19937_BYTES = 2500
"""624 words and a position."""


class RandomState:
    """States of generators at the time of construction: torch's, Python's, NumPy's global ones, and the user's.

    Args:
        devices: those whose CUDA generators count.
        generators: the user's own: `torch.Generator`, `random.Random`, `numpy.random.Generator` or `RandomState`.
    """

    def __init__(self, devices: Iterable[torch.device], generators: Sequence[Any] = ()) -> None:
        self._recorder = capture.recorder()
        self._mark = None if self._recorder is None else self._recorder.mark()
        self._cpu: Tensor | None = None
        self._cuda: dict[torch.device, Tensor] = {}
        # A capture has generator states of its own, which may not be read while it runs.
        if capture.current() is None:
            self._cpu = torch.get_rng_state()
            self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        self._own = [(write, read()) for read, write in map(access, generators)]
        self._python = random.getstate()
        self._numpy = _numpy_state()

    def set(self) -> None:
        """Put the generators into these states."""
        if self._recorder is not None:
            self._recorder.rewind(self._mark)
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for write, state in self._own:
            write(state)
        # Only where somebody has drawn meanwhile: these two cost more than all of torch's.
        if random.getstate() != self._python:
            random.setstate(self._python)
            self._refuse_in_capture("Python's random")
        if not _are_same(_numpy_state(), self._numpy):
            sys.modules["numpy"].random.set_state(self._numpy)
            self._refuse_in_capture("NumPy's global generator")

    def equals(self, other: "RandomState") -> bool:
        """Whether another time's states are these."""
        own = zip(self._own, other._own, strict=True)
        return (
            _are_same(self._cpu, other._cpu)
            and _are_same(self._cuda, other._cuda)
            and all(_are_same(a, b) for (_, a), (_, b) in own)
            and self._python == other._python
            and _are_same(self._numpy, other._numpy)
        )

    def _refuse_in_capture(self, whose: str) -> None:
        if self._recorder is not None:
            raise RuntimeError(
                f"the step cannot be captured: it draws from {whose}, and every replay would use the same numbers; "
                "draw with torch on the device, or take the steps without graph_step"
            )


def check_generators(generators: Any) -> None:
    """Raise TypeError unless this is a sequence of generators."""
    if not isinstance(generators, (list, tuple)):
        raise TypeError(f"generators must be a list or tuple, got {type(generators).__name__}")
    for generator in generators:
        access(generator)


def access(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """Return functions that read and write the state of a generator.

    Raises:
        TypeError: this is no generator.
    """
    if isinstance(generator, torch.Generator):
        return generator.get_state, generator.set_state
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    if hasattr(generator, "bit_generator"):
        bits = generator.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if hasattr(generator, "get_state") and hasattr(generator, "set_state"):
        return generator.get_state, generator.set_state
    raise TypeError(
        "generators takes torch.Generator, random.Random, numpy.random.Generator and RandomState, got "
        f"{type(generator).__name__}"
    )


_last_read: tuple[bytes, Any] = b"", None
"""The memory of NumPy's global generator when its state was last read, and that state."""


def _numpy_state() -> Any:
    """Return the state of NumPy's global generator; None where NumPy is not in use.

    Reading it takes 30 microseconds, and looking whether it has moved since the last time less than one.
    """
    global _last_read
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    bits = numpy.random.get_bit_generator()
    memory = ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES) if type(bits).__name__ == "MT19937" else b""
    known, state = _last_read
    # The second of two normal numbers drawn at once waits elsewhere.
    if not memory or memory != known or state["has_gauss"]:
        state = numpy.random.get_state(legacy=False)
        _last_read = memory, state
    return state


def _are_same(some: Any, other: Any) -> bool:
    """Whether two states are equal: numbers, arrays, or dicts of them."""
    if some is other:
        return True
    if isinstance(some, dict) and isinstance(other, dict):
        return some.keys() == other.keys() and all(_are_same(some[key], other[key]) for key in some)
    return bool((some == other).all() if hasattr(some, "shape") else some == other)
