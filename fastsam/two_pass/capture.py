"""What a step that is captured leaves behind for its replays, beside the work of the device: what Python did in it.

A replay runs no Python. Whoever decides, draws or counts something in Python during a step says so here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from fastsam.kernels import replay_tables


class Recorder(Protocol):
    """Something that records the device's work and repeats it; `fastsam.graph.recorder.CudaGraph` is one."""

    def warm_up(self) -> Any:
        """Context of a step that runs where it will be captured."""

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


class Watched:
    """What Python looked at in a step and went by."""

    def __init__(self) -> None:
        self._seen: list[tuple[Callable[[], Any], Any]] = []

    def add(self, read: Callable[[], Any]) -> None:
        """Watch what `read()` returns."""
        self._seen.append((read, read()))

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return all(read() == then for read, then in self._seen)


class Capture:
    """One captured step."""

    def __init__(self) -> None:
        self.tables = replay_tables.Tables()
        self.watched = Watched()
        self.calls: list[Callable[[], object]] = []
        """What Python has to do in every replay."""


class _Stage:
    def __init__(self, recorder: Recorder, advance: Tensor, watched: Watched, capture: Capture | None = None) -> None:
        self.recorder, self.advance, self.watched, self.capture = recorder, advance, watched, capture


_stage: _Stage | None = None


@contextmanager
def _on_stage(stage: _Stage) -> Iterator[None]:
    global _stage
    _stage = stage
    try:
        yield
    finally:
        _stage = None


@contextmanager
def warming_up(recorder: Recorder, advance: Tensor) -> Iterator[Watched]:
    """Context of a step that runs, with the very launches that will be captured, so that all are compiled.

    Args:
        recorder: what will record it.
        advance: int64, 0-dim on the device: what launches add to the step that addresses random numbers. 0 here.
    """
    watched = Watched()
    with _on_stage(_Stage(recorder, advance.zero_(), watched)), recorder.warm_up():
        yield watched


@contextmanager
def capturing(capture: Capture, recorder: Recorder, advance: Tensor) -> Iterator[None]:
    """Context of a step that is recorded rather than run. `advance` is then the number of steps since."""
    stage = _Stage(recorder, advance, capture.watched, capture)
    with _on_stage(stage), recorder.recording(), replay_tables.capturing(capture.tables):
        yield


def current() -> Capture | None:
    """Return the capture that is under way, if any."""
    return _stage.capture if _stage else None


def recorder() -> Recorder | None:
    """Return what records, in a capture or in a warm-up for one."""
    return _stage.recorder if _stage else None


def advance() -> Tensor | None:
    """Return where a launch finds by how much its step has moved on; None outside of captures and warm-ups."""
    return _stage.advance if _stage else None


def watch(read: Callable[[], Any]) -> None:
    """Let a captured step hold only as long as `read()` returns what it does now."""
    if _stage:
        _stage.watched.add(read)


class Capturable:
    """What `graph_step` asks of whatever takes the steps. These are the answers of one whose steps are all alike."""

    refreshed: tuple[str, ...] = ()
    """Keys of the groups' settings that replays follow by tables on the device, beside those of a fused base."""

    @property
    def is_active(self) -> bool:
        """Whether the next step perturbs; a captured one stands for steps of its kind alone."""
        return False

    @property
    def radius_scale(self) -> float:
        """What the radius is multiplied by in the next step; replays follow it."""
        return 1.0

    def why_not_capturable(self, scaler: Any) -> str | None:
        """Return why no step can be captured, if so; `scaler` is the GradScaler or None."""
        return None

    def is_warm(self) -> bool:
        """Return whether the next step does what a captured one does; one that does not runs as usual."""
        return True

    def static_outputs(self) -> list[tuple[Any, str]]:
        """Return attributes, by holder and name, that a step sets to tensors which every replay leaves as well."""
        return []

    def _discard(self) -> None:
        """Forget a step that was recorded in part and never ran; nothing on the device has changed."""

    def _replayed(self) -> None:
        """A replay has just been launched."""
