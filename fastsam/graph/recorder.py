"""A CUDA graph that keeps to the random numbers of the steps it stands for.

A graph's random numbers start where the generator stands when it is replayed, and only go on from there. A second pass
that draws the first one's numbers again has to rewind: its work gets a generator state of its own, which every replay
places where the first pass began. How far that is from the start of the step, a step run beforehand tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsam.kernels import ops
from fastsam.two_pass.batch import tensors_of
from fastsam.two_pass.capture import Recorder


def recorder_for(params: list[Tensor], batch: tuple[Any, ...]) -> Recorder | None:
    """Return what records steps on the parameters' device; None where steps run as usual.

    Raises:
        ValueError: parameters or batch are on several devices.
        RuntimeError: Triton's kernels do not run on the device.
    """
    devices = {p.device for p in params}
    device = next(iter(devices))
    if not any(d.type == "cuda" for d in devices):
        return None
    if len(devices) > 1:
        raise ValueError(f"the step cannot be captured: parameters are on {len(devices)} devices; all must be on one")
    if other := next((t.device for t in tensors_of(batch, every=True) if t.device != device), None):
        raise ValueError(f"a tensor of the example batch is on {other}, the parameters on {device}; move the batch")
    if not ops.uses_triton(params):
        raise RuntimeError(
            "graph_step needs the Triton kernels, which do not run here (no Triton, a GPU older than Ampere, or "
            "set_backend('torch')); take the steps without it"
        )
    return CudaGraph(device)


class CudaGraph:
    """Records work on a stream of its own and replays it on the current one; a `capture.Recorder`.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        # tables and scratch that are kept per stream are then there when the capture begins
        self._stream = torch.cuda.Stream(self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._draws = _Draws(torch.cuda.default_generators[self._device.index])

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Run as usual, on the stream of the capture."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), self._draws.warm_up():
                yield
        finally:
            # For a restore too.
            here.wait_stream(self._stream)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record; the graph is there if nothing was raised."""
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            graph = torch.cuda.CUDAGraph()
            # other threads, such as a loader's that pins memory, may go on with what a capture forbids
            work = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            try:
                with self._draws.recording(graph), work:
                    yield
            finally:
                # Torch leaves its own stream behind where the end of a capture fails.
                torch.cuda.set_stream(here)
            self._graph = graph

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        assert self._graph is not None
        with self._draws.replay():
            self._graph.replay()

    def release(self) -> None:
        """Drop the graph."""
        self._graph, self._draws.states = None, []

    def mark(self) -> Any:
        """Note how far the step has drawn."""
        return self._draws.mark()

    def rewind(self, mark: Any) -> None:
        """Draw from here on what was drawn after the mark."""
        self._draws.rewind(mark)


class _Draws:
    """Where in a generator's sequence a step's parts draw.

    Args:
        generator: the device's default one.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._marks: list[int] = []
        self._rewinds: list[int] = []
        self._total = 0
        self._start: int | None = None
        self._seen: tuple[int, list[int]] | None = None
        self.states: list[torch.Generator] = []

    @property
    def _draws_nothing(self) -> bool:
        return self._total == 0 and not any(self._marks)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        self._marks, self._rewinds, self._start = [], [], self._generator.get_offset()
        try:
            yield
        finally:
            self._total, self._start = self._generator.get_offset() - self._start, None

    def mark(self) -> int:
        """Return the mark's number."""
        if self._seen is None:
            assert self._start is not None
            self._marks.append(self._generator.get_offset() - self._start)
            return len(self._marks) - 1
        n_marks, rewinds = self._seen
        self._seen = n_marks + 1, rewinds
        return n_marks

    def rewind(self, mark: int) -> None:
        if self._seen is None:
            self._rewinds.append(mark)
            return
        rewinds = self._seen[1]
        rewinds.append(mark)
        if len(rewinds) < len(self.states):
            self._generator.graphsafe_set_state(self.states[len(rewinds)])

    @contextmanager
    def recording(self, graph: Any) -> Iterator[None]:
        # not the generator's own state, which a failed capture would spoil and other graphs may hold
        own = self._generator.graphsafe_get_state()
        states = [self._generator.clone_state() for _ in range(1 + len(self._rewinds))]
        self.states = [] if self._draws_nothing else states
        for state in self.states[1:]:
            graph.register_generator_state(state)
        # The beginning of a capture registers this one.
        self._generator.graphsafe_set_state(states[0])
        self._seen = 0, []
        try:
            yield
            if self._seen != (len(self._marks), self._rewinds):
                raise RuntimeError("the step draws its random numbers in another order than when it last ran")
        finally:
            self._generator.graphsafe_set_state(own)
            self._seen = None

    @contextmanager
    def replay(self) -> Iterator[None]:
        if not self.states:
            yield
            return
        start, seed = self._generator.get_offset(), self._generator.initial_seed()
        for state, drawn in zip(self.states, [0, *(self._marks[mark] for mark in self._rewinds)], strict=True):
            if state.initial_seed() != seed:
                state.manual_seed(seed)
            state.set_offset(start + drawn)
        yield
        self._generator.set_offset(start + self._total)
