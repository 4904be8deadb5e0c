"""Whole training steps as CUDA graphs: passes, perturbation, restore, base step and losses in a single launch.

    step = graph_step(opt, losses, x, y)
    for x, y in loader:
        loss = step(x, y)                                # instead of opt.step(losses, x, y)

The first calls run as usual: they are training steps like any other, make the optimizer's state, and compile the
kernels. Then a step is captured, which runs nothing, and from there on each call replays it: the same kernels with the
same numbers, so that training goes on bit for bit. What may change from step to step lies on the device and is
refreshed before a replay: learning rates, momenta, decays and radii of all groups, the loss scale, and the counters
that address ESAM's masks and stochastic rounding.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from fastsam.arguments import check_clip, check_integer, check_scaler
from fastsam.graph import recorder as recorders
from fastsam.graph.captured_step import CapturedStep, CaptureError
from fastsam.graph.guards import Guards
from fastsam.graph.plain_step import as_stepper
from fastsam.two_pass import capture
from fastsam.two_pass.batch import Whole, batch_size, has_own_rows, replace_tensors, tensors_of
from fastsam.two_pass.capture import Recorder, Watched
from fastsam.two_pass.containers import labels, parts
from fastsam.two_pass.gradients import flat

_MOST_WASTED = 4
"""So many captures one after the other that served less than two steps, and no more are made."""


def graph_step(
    opt: Optimizer,
    loss_fn: Callable[..., Tensor],
    *example_batch: Any,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad_norm: float | None = None,
    warmup: int = 3,
) -> "GraphStep":
    """Return a function that takes a batch and takes a training step, on a GPU as one CUDA graph.

    Args:
        opt: a fastsam optimizer, or torch's SGD, Adam or AdamW (for SAF and MESA, or to compare with), whose step on a
            GPU is then taken in fastsam's kernel, equal to torch's to rounding.
        loss_fn: `loss_fn(*batch)` returns per-sample losses of shape [n], without backward. It must not read the
            device on the host, and what it decides in Python is decided once; but dropout draws anew in every step,
            and SAF and MESA may change their epoch.
        example_batch: a batch as most will be, on the model's device; its values do not matter. Other shapes, such as
            that of a last partial batch, run without a graph, and so do batches with NumPy arrays, whose numbers a
            graph would keep.
        scaler: a GradScaler; call its `update()` after each step, as always.
        clip_grad_norm: largest 2-norm of the final gradient.
        warmup: calls that run as usual before the first capture, >= 1. One does before every further capture.

    Returns:
        A `GraphStep`. On the CPU it takes every step as usual.

    Raises:
        TypeError: an argument of the wrong type, or a batch without rows or with a part that cannot be cut.
        ValueError: an argument out of range, leading sizes of the batch that differ or another device than the
            model's, or an optimizer whose step cannot be captured: over several processes or devices,
            ESAM(strict=True), batch norm with momentum=None, a base that reads the device, or step hooks other than
            MESA's, which no replay would run.
        RuntimeError: Triton's kernels do not run on this GPU.
    """
    return GraphStep(opt, loss_fn, example_batch, scaler, clip_grad_norm, warmup)


class GraphStep:
    """Takes training steps by replaying a captured one; see `graph_step`.

    A call returns the first pass's mean loss, 0-dim, detached, on its device. p.grad, `opt.last_grad_norm` and all
    counters are then as after `opt.step`; the memory of p.grad is the graph's, and the next replay writes over it.

    A step is captured anew, after one that runs as usual, when groups, settings or hooks of the optimizer, the mode of
    its `model=`, an autocast around the call, an epoch of SAF or MESA, requires_grad, or the memory of parameters and
    state have changed, or a state dict was loaded. For whatever else `loss_fn` depends on, call `reset()`.
    """

    def __init__(
        self,
        opt: Optimizer,
        loss_fn: Callable[..., Tensor],
        example_batch: tuple[Any, ...],
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
        warmup: int = 3,
    ) -> None:
        _check_arguments(opt, loss_fn, example_batch, scaler, clip_grad_norm, warmup)
        self._recorder = recorder = recorders.recorder_for(flat(opt.param_groups), example_batch)
        self._stepper: Any = as_stepper(opt, fused=recorder is not None)
        if recorder is not None and (reason := _why_not_capturable(opt) or self._stepper.why_not_capturable(scaler)):
            raise ValueError(f"the step cannot be captured: {reason}; take it without graph_step")
        self.opt, self._loss_fn, self._scaler, self._clip_grad_norm = opt, loss_fn, scaler, clip_grad_norm
        self._layout = _layout(example_batch)
        self._advance = torch.zeros((), dtype=torch.int64, device=flat(opt.param_groups)[0].device)
        self._guards = Guards(self._stepper)
        self._warmup_left = warmup
        self._warmed: tuple[dict[str, Any], Watched] | None = None
        self._captured_step: CapturedStep | None = None
        self._wasted = 0
        self.replays = 0
        """How many of the steps were replays."""
        # A hook is not to keep a graph's memory.
        ours = weakref.ref(self)
        # another state has other tensors
        getattr(opt, "base_optimizer", opt).register_load_state_dict_post_hook(lambda *_: _reset(ours()))

    @property
    def captured(self) -> bool:
        """Whether there is a captured step."""
        return self._captured_step is not None

    def reset(self) -> None:
        """Drop the captured step, and its memory; the next call runs as usual, and from then on all is as before."""
        self._warmup_left = max(self._warmup_left, 1)
        if self._recorder is not None and self._captured_step is not None:
            self._captured_step = None
            self._recorder.release()

    def __call__(self, *batch: Any) -> Tensor:
        """Take a step on a batch and return its mean loss.

        Raises:
            RuntimeError: the step cannot be captured; weights, states and counters are what they were.
            Exception: what the optimizer's `step` raises.
        """
        recorder = self._recorder
        # what a replay reads from the groups is no part of its guards
        self._stepper.check_groups()
        if recorder is None or _layout(batch) != self._layout or not self._stepper.is_warm():
            return self._step(*batch)
        if self._captured_step is not None and (change := self._captured_step.change()):
            self._drop(change)
        if self._captured_step is None:
            if not self._is_warmed_up():
                return self._warm_up(recorder, batch)
            if reason := _why_not_capturable(self.opt):
                raise CaptureError(f"the step cannot be captured: {reason}")
            self._captured_step = CapturedStep(
                self._stepper, self._step, batch, recorder, self._advance, self._guards, self._scaler
            )
        loss = self._captured_step.replay(batch)
        self.replays += 1
        return loss

    def _step(self, *batch: Any) -> Tensor:
        return self._stepper.step(self._loss_fn, *batch, scaler=self._scaler, clip_grad_norm=self._clip_grad_norm)

    def _is_warmed_up(self) -> bool:
        """Whether the next step would do what the last one did, so that all it needs is there."""
        if self._warmup_left > 0 or self._warmed is None:
            return False
        guarded, watched = self._warmed
        return guarded == self._guards.now() and watched.holds()

    def _warm_up(self, recorder: Recorder, batch: tuple[Any, ...]) -> Tensor:
        # Aligned as those of a capture.
        copies = [t.clone() for t in tensors_of(batch, every=True)]
        with capture.warming_up(recorder, self._advance) as watched:
            loss = self._step(*replace_tensors(batch, copies, every=True))
        self._warmup_left -= 1
        self._warmed = self._guards.now(), watched
        return loss

    def _drop(self, change: str) -> None:
        """Drop a captured step that no longer holds, and give up where that comes to nothing again and again."""
        assert self._captured_step is not None
        self._wasted = self._wasted + 1 if self._captured_step.replays < 2 else 0
        self.reset()
        if self._wasted == _MOST_WASTED:
            self._recorder = None
            warnings.warn(
                f"graph_step goes on without a graph: {change} changes so often that a capture serves a step or none",
                stacklevel=3,
            )


def _reset(step: GraphStep | None) -> None:
    if step is not None:
        step.reset()


def _check_arguments(
    opt: Any, loss_fn: Any, batch: tuple[Any, ...], scaler: Any, clip_grad_norm: Any, warmup: Any
) -> None:
    if not isinstance(opt, Optimizer):
        raise TypeError(f"opt must be a torch optimizer, got {type(opt).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of the batch, got {type(loss_fn).__name__}")
    batch_size(batch)
    check_scaler(scaler)
    check_clip(clip_grad_norm)
    check_integer("warmup", warmup)
    if warmup < 1:
        raise ValueError(f"warmup must be at least 1, got {warmup}: the first step makes what a capture needs")


def _why_not_capturable(opt: Optimizer) -> str | None:
    """Return why no step of any optimizer could be captured here."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "it is taken by several processes"
    before, after = opt._optimizer_step_pre_hooks.values(), opt._optimizer_step_post_hooks.values()
    if any(not getattr(hook, "can_be_captured", False) for hook in (*before, *after)):
        return f"{type(opt).__name__} has step hooks, which a replay would not run"
    return None


class _Same:
    """Equals what holds the very same object."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.item is self.item

    __hash__ = None  # type: ignore[assignment]


def _layout(batch: Any) -> Any:
    """Everything about a nested batch but the numbers in its tensors."""
    if isinstance(batch, Tensor) and batch.layout is torch.strided:
        return batch.shape, batch.stride(), batch.dtype, batch.device
    if isinstance(batch, Whole):
        return Whole, _layout(batch.value)
    if has_own_rows(batch):
        # arrays and the like, whose numbers a capture would keep: never like those of another step
        return object()
    if (inner := parts(batch)) is not None:
        return type(batch), labels(batch), list(map(_layout, inner))
    return (type(batch), batch) if isinstance(batch, (str, int, float, type(None))) else _Same(batch)
