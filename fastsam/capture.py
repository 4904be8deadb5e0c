"""What a step that is captured leaves behind for its replays, beside the work of the device: what Python did in it.

A replay runs no Python. Whoever decides, draws or counts something in Python during a step says so here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from fastsam.kernels import captured


class Recorder(Protocol):
    """Something that records the device's work and repeats it; `cuda_graph.CudaGraph` is one."""

    def rehearsal(self) -> Any:
        """Context of a step that runs as usual, the way that it will be captured."""

    def recording(self) -> Any:
        """Context of a step whose work is recorded; nothing runs."""

    def replay(self) -> None:
        """Run what was recorded, on the current stream."""

    def release(self) -> None:
        """Drop what was recorded, and its memory."""

    def mark(self) -> Any:
        """Note how far the random numbers of this step are."""

    def rewind(self, mark: Any) -> None:
        """Go on with the random numbers that followed a mark of this step."""


class Capture:
    """One captured step.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.tables = captured.Tables()
        self.advance = torch.zeros((), dtype=torch.int64, device=device)
        """Steps taken since the capture: what captured launches add to the step that addresses random numbers."""
        self.calls: list[Callable[[], object]] = []
        """What Python has to do in every replay."""
        self._watched: list[tuple[Callable[[], Any], Any]] = []

    def watch(self, read: Callable[[], Any]) -> None:
        """Make the step be captured anew when `read()` no longer returns what it does now."""
        self._watched.append((read, read()))

    def holds(self) -> bool:
        """Whether all that is watched is as it was."""
        return all(read() == then for read, then in self._watched)


_current: Capture | None = None
_recorder: Recorder | None = None


@contextmanager
def rehearsing(recorder: Recorder) -> Iterator[None]:
    """Context of a step that is about to be captured as it runs here."""
    global _recorder
    _recorder = recorder
    try:
        with recorder.rehearsal():
            yield
    finally:
        _recorder = None


@contextmanager
def capturing(capture: Capture, recorder: Recorder) -> Iterator[None]:
    """Context of a step that is recorded rather than run."""
    global _current, _recorder
    _current, _recorder = capture, recorder
    try:
        with recorder.recording(), captured.capturing(capture.tables):
            yield
    finally:
        _current = _recorder = None


def current() -> Capture | None:
    """Return the capture that is under way, if any."""
    return _current


def recorder() -> Recorder | None:
    """Return what records, in a capture or in a rehearsal for one."""
    return _recorder


class Capturable:
    """What `graph_step` asks of whatever takes the steps. These are the answers of one whose steps are all alike."""

    _renewed: tuple[str, ...] = ()
    """Keys of the groups' settings that replays follow by tables on the device, beside those of a fused base."""

    def _obstacle(self, scaler: Any) -> str | None:
        """Return why no step can be captured, if so."""
        return None

    def _is_settled(self) -> bool:
        """Whether steps are taken in the way they will be from now on."""
        return True

    def _is_typical(self) -> bool:
        """Whether the next step does what the others do."""
        return True

    def _outcomes(self) -> list[tuple[Any, str]]:
        """Attributes, by holder and name, that a step sets to values which every replay leaves as well."""
        return []

    def _discard(self) -> None:
        """Forget a step that was recorded in part and never ran; nothing on the device has changed."""

    def _replayed(self) -> None:
        """A replay has just been launched."""
