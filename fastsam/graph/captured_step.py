"""One captured step: what was recorded, its guards, and how a replay makes up for what Python did."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fastsam.graph.guards import Guards, change
from fastsam.two_pass import capture
from fastsam.two_pass.batch import replace_tensors, tensors_of
from fastsam.two_pass.capture import Capture, Recorder
from fastsam.two_pass.gradients import clear, flat, put, take
from fastsam.two_pass.wrapper import COUNTERS, STEP


class CaptureError(RuntimeError):
    """A step cannot be captured; nothing has happened."""


class CapturedStep:
    """A step that is recorded on construction, without running, and then replayed.

    Args:
        stepper: whose step it is.
        step: takes the step on a batch and returns the loss.
        batch: of the layout that all replays have.
        recorder: records and replays.
        advance: int64, 0-dim on the device, for launches that draw random numbers: steps since the recording.
        guards: look at what the step goes by.
        scaler: of the step, or None.

    Raises:
        CaptureError: the step cannot be recorded; weights, states and counters are what they were.
    """

    def __init__(
        self,
        stepper: Any,
        step: Callable[..., Tensor],
        batch: tuple[Any, ...],
        recorder: Recorder,
        advance: Tensor,
        guards: Guards,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._stepper, self._recorder = stepper, recorder
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._params, self._target = flat(stepper.param_groups), id(stepper._scaler_target)
        self._check_scaler()
        self._guards, self._guarded, self._numbers = guards, guards.now(), guards.numbers()
        self._inputs = [t.clone() for t in tensors_of(batch, every=True)]
        self._counters = {key: stepper.param_groups[0][key] for key in COUNTERS if key in stepper.param_groups[0]}
        self._capture, self._advance = Capture(), advance
        self.replays = 0
        outputs = self._read_outputs()
        # Autograd is to make gradients in the graph's memory.
        clear(self._params)
        torch.clear_autocast_cache()
        draws = torch.get_rng_state()
        try:
            with capture.capturing(self._capture, recorder, advance):
                self._loss = step(*replace_tensors(batch, self._inputs, every=True))
        except BaseException as error:
            recorder.release()
            self._forget(outputs)
            if not isinstance(error, Exception):
                raise
            raise CaptureError(
                f"the step cannot be captured: {_first(error)}. Nothing was run. What is captured must not read the "
                "device on the host (item(), print, if) nor bring data from there; take such steps without graph_step"
            ) from error
        finally:
            # What the CPU drew, replays will not draw either.
            torch.set_rng_state(draws)
            # Of casts that lie in the graph's memory.
            torch.clear_autocast_cache()
        self._counts = self._count_back()
        self._capture.tables.fill()
        self._grads = take(self._params)
        self._outputs = self._read_outputs()
        self._scaled = self._take_scaler_state()

    def change(self) -> str | None:
        """Return what has changed since, of all that was recorded for good; None if nothing has."""
        if found := change(self._guards.now(), self._guarded):
            return found
        return None if self._capture.watched.holds() else "an epoch, mode or setting of a loss"

    @torch.no_grad()
    def replay(self, batch: tuple[Any, ...]) -> Tensor:
        """Take the step on a batch and return its loss."""
        self._check_scaler()
        # An autocast around the steps would go on with casts of older weights.
        torch.clear_autocast_cache()
        torch._foreach_copy_(self._inputs, list(tensors_of(batch, every=True)))
        if (numbers := self._guards.numbers()) != self._numbers:
            self._capture.tables.refresh()
            self._numbers = numbers
        groups = self._stepper.param_groups
        if self._counters:
            self._advance.fill_(groups[0][STEP] - self._counters[STEP])
        for group in groups:
            for key, count in self._counts.items():
                group[key] += count
        self._recorder.replay()
        self.replays += 1
        put(self._params, self._grads)
        torch.autograd.graph.increment_version(self._params)
        _write_outputs(self._outputs)
        for call in self._capture.calls:
            call()
        if self._scaler is not None:
            self._scaler_states()[self._target] = self._scaled.copy()
        self._stepper._replayed()
        # The next replay writes over the loss itself.
        return self._loss.clone()

    def _count_back(self) -> dict[str, int]:
        """Set the groups' counters to what they were before the capture, and return by how much it moved them."""
        groups = self._stepper.param_groups
        advances = {key: groups[0][key] - before for key, before in self._counters.items()}
        for group in groups:
            group.update(self._counters)
        return advances

    def _scaler_states(self) -> Any:
        """What the GradScaler knows of the steps of optimizers, by their ids, and forgets in `update()`."""
        assert self._scaler is not None
        return self._scaler._per_optimizer_states

    def _take_scaler_state(self) -> Any:
        """Return what a step leaves in the GradScaler, which nobody has taken yet."""
        return None if self._scaler is None else self._scaler_states().pop(self._target, None)

    def _check_scaler(self) -> None:
        if self._scaler is not None and self._scaler_states()[self._target]["stage"] is not OptState.READY:
            raise RuntimeError("a step has already been taken since the GradScaler's last update(); call update()")

    def _read_outputs(self) -> list[tuple[Any, str, Any]]:
        return [(holder, name, getattr(holder, name)) for holder, name in self._stepper.static_outputs()]

    def _forget(self, outputs: list[tuple[Any, str, Any]]) -> None:
        """Leave no trace of a step that was recorded in part and never ran."""
        # Needs triton, which captures have.
        from fastsam.kernels import launch_tables

        launch_tables.forget()
        clear(self._params)
        self._count_back()
        self._take_scaler_state()
        self._stepper._discard()
        _write_outputs(outputs)


def _write_outputs(outputs: list[tuple[Any, str, Any]]) -> None:
    for holder, name, value in outputs:
        # what users may keep is a copy, since the next replay writes over the graph's own
        setattr(holder, name, value.clone() if name == "last_grad_norm" and value is not None else value)


def _first(error: BaseException) -> BaseException:
    """The first of a chain: once a capture has failed, whatever is tried in it fails for that reason alone."""
    while error.__context__ is not None:
        error = error.__context__
    return error
