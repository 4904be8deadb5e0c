"""One captured step: what was recorded, what it takes for given, and how a replay makes up for what Python did."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fastsam import capture
from fastsam.base_step import steps_in_a_kernel
from fastsam.batch import replace_tensors, tensors_of
from fastsam.capture import Capture, Recorder
from fastsam.gradients import clear, flat, put, take
from fastsam.wrapping import STEP

_RENEWED = ("lr", "momentum", "dampening", "weight_decay", "betas", "eps")
"""Settings of SGD, Adam and AdamW that a replay reads from tables on the device."""
_address: Any = Tensor.data_ptr
_requires_grad = operator.attrgetter("requires_grad")


class RecordedStep:
    """A step that is recorded on construction, without running, and then replayed.

    Args:
        stepper: whose step it is.
        step: takes the step on a batch and returns the loss.
        batch: of the layout that all replays have.
        recorder: records and replays.
        advance: int64, 0-dim on the device, for launches that draw random numbers: steps since the recording.
        scaler: of the step, or None.

    Raises:
        RuntimeError: the step cannot be recorded; weights, states and counters are what they were.
    """

    def __init__(
        self,
        stepper: Any,
        step: Callable[..., Tensor],
        batch: tuple[Any, ...],
        recorder: Recorder,
        advance: Tensor,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._stepper, self._recorder = stepper, recorder
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._params, self._target = flat(stepper.param_groups), id(stepper._scaler_target)
        base = getattr(stepper, "base_optimizer", None) or stepper.optimizer
        self._renewed = (*(_RENEWED if steps_in_a_kernel(base) else ()), *stepper._renewed)
        self._given, self._numbers = self._what_is_given(), self._what_is_renewed()
        self._inputs = [t.clone() for t in tensors_of(batch)]
        self._counter: int | None = stepper.param_groups[0].get(STEP)
        self._capture, self._advance = Capture(), advance
        self.replays = 0
        clear(self._params)  # autograd is to make gradients in the graph's memory
        torch.clear_autocast_cache()
        try:
            with capture.capturing(self._capture, recorder, advance):
                self._loss = step(*replace_tensors(batch, self._inputs))
        except BaseException as error:
            recorder.release()
            self._forget()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(
                f"the step cannot be captured: {error}. Nothing was run. What is captured must not read the device on "
                "the host (item(), print, if) nor bring data from there; take such steps without graph_step"
            ) from error
        finally:
            torch.clear_autocast_cache()  # of casts that lie in the graph's memory
        self._counts = self._count_back()
        self._capture.tables.fill()
        self._grads = take(self._params)
        self._outcomes = [(holder, name, getattr(holder, name)) for holder, name in stepper._outcomes()]
        self._scaled = self._take_scaler_state()

    def change(self) -> str | None:
        """Return what has changed since, of all that was recorded for good; None if nothing has."""
        now = self._what_is_given()
        if now != self._given:
            return next(name for name, value in now.items() if value != self._given.get(name))
        return None if self._capture.holds() else "an epoch, mode or setting of a loss"

    @torch.no_grad()
    def replay(self, batch: tuple[Any, ...]) -> Tensor:
        """Take the step on a batch and return its loss."""
        if self._scaler is not None and self._scaler_states()[self._target]["stage"] is not OptState.READY:
            raise RuntimeError("a step has already been taken since the GradScaler's last update(); call update()")
        torch._foreach_copy_(self._inputs, list(tensors_of(batch)))
        if (numbers := self._what_is_renewed()) != self._numbers:
            self._capture.tables.renew()
            self._numbers = numbers
        groups = self._stepper.param_groups
        if self._counter is not None:
            self._advance.fill_(groups[0][STEP] - self._counter)
            for group in groups:
                group[STEP] += self._counts
        self._recorder.replay()
        self.replays += 1
        put(self._params, self._grads)
        torch.autograd.graph.increment_version(self._params)
        for holder, name, value in self._outcomes:
            setattr(holder, name, value)
        for call in self._capture.calls:
            call()
        if self._scaler is not None:
            self._scaler_states()[self._target] = self._scaled.copy()
        self._stepper._replayed()
        return self._loss.clone()  # the next replay writes over the loss itself

    def _what_is_given(self) -> dict[str, Any]:
        """Everything that was recorded for good and is cheap to look at."""
        followed = {"params", STEP, *self._renewed}
        given: dict[str, Any] = {}
        for i, group in enumerate(self._stepper.param_groups):
            given |= {f"{key} of group {i}": value for key, value in group.items() if key not in followed}
            lr = group.get("lr")
            given[f"the kind of lr of group {i}"] = lr.data_ptr() if isinstance(lr, Tensor) else None
            given[f"whether group {i} has momentum"] = bool(group.get("momentum"))
        params = flat(self._stepper.param_groups)
        given["the parameters' memory"] = tuple(map(_address, params))
        given["requires_grad of the parameters"] = tuple(map(_requires_grad, params))
        model = getattr(self._stepper, "model", None)
        given["the mode of the model"] = None if model is None else model.training
        return given

    def _what_is_renewed(self) -> list[Any]:
        """What the tables follow. A tensor on the device is followed by the kernel itself."""
        values = [group.get(key) for group in self._stepper.param_groups for key in self._renewed]
        return [_on_host(value) for value in values]

    def _count_back(self) -> int:
        """Set the groups' counters to what they were before the capture, and return by how much it moved them."""
        if self._counter is None:
            return 0
        groups = self._stepper.param_groups
        advance = groups[0][STEP] - self._counter
        for group in groups:
            group[STEP] = self._counter
        return advance

    def _scaler_states(self) -> Any:
        """What the GradScaler knows of the steps of optimizers, by their ids, and forgets in `update()`."""
        assert self._scaler is not None
        return self._scaler._per_optimizer_states

    def _take_scaler_state(self) -> Any:
        """Return what a step leaves in the GradScaler, which nobody has taken yet."""
        return None if self._scaler is None else self._scaler_states().pop(self._target, None)

    def _forget(self) -> None:
        """Leave no trace of a step that was recorded in part and never ran."""
        from fastsam.kernels import chunks  # needs triton, which captures have

        chunks.forget()
        clear(self._params)
        self._count_back()
        self._take_scaler_state()
        self._stepper._discard()


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else None
    return value
