"""The one table of training methods that the command line knows: a new one is one entry here and nothing else.

Its name appears in `--help`, its knobs become options, and `fastsam compare` tunes and times it as the entry says.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam.esam import ESAM
from fastsam.msam import MSAM
from fastsam.sam import SAM

Knobs = Mapping[str, Any]
"""A method's settings by name, numbers or words; every method has an `lr`."""
Losses = Callable[[Tensor, Tensor], Tensor]
"""`losses(x, y)` returns the per-sample losses, shape [n], of a batch of n."""
Step = Callable[[Any, Losses, Tensor, Tensor, torch.amp.GradScaler | None], Tensor]


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line that says what, and what to do."""


def plain_step(
    optimizer: Optimizer, losses: Losses, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None
) -> Tensor:
    """Take a step of a plain torch optimizer.

    Args:
        optimizer: any first-order torch optimizer.
        losses: per-sample losses of a batch.
        x: the batch's inputs, first dimension n.
        y: the batch's labels, int64 of shape [n].
        scaler: a GradScaler, whose `update()` is the caller's, or None.

    Returns:
        The batch's mean loss, 0-dim, detached, on its device.
    """
    optimizer.zero_grad()
    loss = losses(x, y).mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
    return loss.detach()


def own_step(optimizer: Any, losses: Losses, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Take a step of a fastsam optimizer, which runs its passes itself. Arguments and result as in `plain_step`."""
    return optimizer.step(losses, x, y, scaler=scaler)


def shard_step(optimizer: MSAM, losses: Any, x: Tensor, y: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """Take a step of mSAM, and let `BatchLosses` count every shard's first pass. Otherwise as `own_step`."""
    is_first = itertools.cycle((True, False))

    def counted(x: Tensor, y: Tensor) -> Tensor:
        losses.counting = next(is_first)
        return losses(x, y)

    return optimizer.step(counted, x, y, scaler=scaler)


@dataclass(frozen=True)
class Method:
    """How one method is built, stepped, tuned and compared.

    Args:
        summary: one line for `--help`.
        build: returns the optimizer for a model and this method's knobs.
        knobs: its settings with their defaults; each is an option of the command line.
        step: takes one step; default: the optimizer's own `step(losses, x, y)`.
        base: the method whose step time is 1 in comparisons; None for a base optimizer.
        tuned: the knob that a comparison chooses on held-out data; None for none.
        grid: the values it is chosen from, smallest first.
        note: what the progress line says of the last step, from the optimizer.
    """

    summary: str
    build: Callable[[nn.Module, Knobs], Optimizer]
    knobs: Knobs
    step: Step = own_step
    base: str | None = None
    tuned: str | None = None
    grid: tuple[float, ...] = ()
    note: Callable[[Any], str] = lambda optimizer: ""


_SGD_KNOBS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}

METHODS: dict[str, Method] = {
    "sgd": Method(
        summary="SGD with momentum",
        build=lambda model, knobs: torch.optim.SGD(model.parameters(), **knobs),
        knobs=_SGD_KNOBS,
        step=plain_step,
    ),
    "adamw": Method(
        summary="AdamW",
        build=lambda model, knobs: torch.optim.AdamW(model.parameters(), **knobs),
        knobs={"lr": 3e-3, "weight_decay": 0.01},
        step=plain_step,
    ),
    "sam": Method(
        summary="Sharpness-Aware Minimization around SGD",
        build=lambda model, knobs: SAM(model.parameters(), torch.optim.SGD, model=model, **knobs),
        knobs={**_SGD_KNOBS, "rho": 0.05},
        base="sgd",
        tuned="rho",
        # the paper's grid without 0.01 and 0.02, which nobody can tell from SGD on the digits and which would cost
        # a third of the time that choosing takes
        grid=(0.05, 0.1, 0.2, 0.5),
    ),
    "asam": Method(
        summary="adaptive SAM around SGD: the perturbation is relative to each weight's size",
        build=lambda model, knobs: SAM(model.parameters(), torch.optim.SGD, adaptive=True, model=model, **knobs),
        knobs={**_SGD_KNOBS, "rho": 0.5},
        base="sgd",
        tuned="rho",
        grid=(0.5, 1.0, 2.0, 5.0),  # ten times SAM's
    ),
    "esam": Method(
        summary="Efficient SAM around SGD: perturbs tensors drawn with --beta, goes back on the --gamma sharpest rows",
        build=lambda model, knobs: ESAM(model.parameters(), torch.optim.SGD, model=model, **knobs),
        knobs={**_SGD_KNOBS, "rho": 0.05, "beta": 0.6, "gamma": 0.5, "mask": "tensor"},
        base="sgd",
        tuned="rho",
        grid=(0.05, 0.1, 0.2, 0.5),
        note=lambda optimizer: f"rows {optimizer.last_selected_fraction:.0%}",
    ),
    "msam": Method(
        summary="mSAM around SGD: SAM on each of the --num-shards parts of the batch by itself",
        build=lambda model, knobs: MSAM(model.parameters(), torch.optim.SGD, model=model, **knobs),
        # 16 rows in each shard of the default batch, as the paper's on CIFAR
        knobs={**_SGD_KNOBS, "rho": 0.05, "num_shards": 4},
        step=shard_step,
        base="sgd",
        tuned="rho",
        grid=(0.05, 0.1, 0.2, 0.5),
    ),
}
CHOICES = {"mask": ("tensor", "element")}
"""What the knobs that are words may be."""


def knobs_for(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all knobs of a method: those given, and its own defaults for those that are None or absent.

    Raises:
        InputError: a given knob is none of the method's.
    """
    knobs = METHODS[name].knobs
    chosen = {knob: value for knob, value in given.items() if value is not None}
    if unknown := [knob for knob in chosen if knob not in knobs]:
        raise InputError(f"{name} has no {option(unknown[0])}; it has {', '.join(map(option, knobs))}")
    return {**knobs, **chosen}


def option(knob: str) -> str:
    """Return a knob's name on the command line."""
    return "--" + knob.replace("_", "-")


def build(name: str, model: nn.Module, knobs: Knobs) -> Optimizer:
    """Return the optimizer of a method, or raise InputError if it refuses a knob's value."""
    try:
        return METHODS[name].build(model, knobs)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from error


class BatchLosses:
    """Per-sample losses of a batch, for the step; counts the hits of each step's first forward pass on the side.

    Args:
        model: what computes the logits, shape [n, classes].
        label_smoothing: from 0 to 1.
        amp_dtype: torch.float16 or torch.bfloat16 for autocast, None for none.
        device: where model and batches are.
    """

    def __init__(
        self, model: nn.Module, label_smoothing: float, amp_dtype: torch.dtype | None, device: torch.device
    ) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.autocast: Any = nullcontext() if amp_dtype is None else torch.autocast(device.type, amp_dtype)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.rows, self.counting = 0, True

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return float32 losses of shape [n]; set `counting` before a step for its first call to be counted."""
        with self.autocast:
            logits = self.model(x)
        logits = logits.float()  # 16 bits are too few for a log-softmax
        if self.counting:
            self.hits += (logits.detach().argmax(dim=1) == y).sum()
            self.rows += len(y)
            self.counting = False
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)


class StepClock:
    """Times single steps; on a GPU by events, so that nothing waits for it before the epoch's end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """Return a mark for `marks`, which holds one pair for each step."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median_ms(self) -> float:
        """Return the median step in milliseconds; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in self.marks)
        return 1e3 * statistics.median(end - start for start, end in self.marks)
