"""The one table of training methods that the command line knows: a new one is one entry here and nothing else.

Its name appears in `--help`, its knobs become options, and `fastsam compare` tunes and times it as the entry says.
"""

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
from fastsam.mesa import MESA
from fastsam.msam import MSAM
from fastsam.saf import SAF
from fastsam.sam import SAM
from fastsam.trajectory.samples import SampleToRankSampler
from fastsam.two_pass.state import Stage, under_way

Knobs = Mapping[str, Any]
"""A method's settings by name, numbers or words; every method has an `lr`."""
Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs of shape [n, ...], int64 labels of shape [n], and int64 sample ids of shape [n]."""
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`losses(*batch)` returns the per-sample losses, shape [n], of a batch of n."""


class InputError(Exception):
    """The user asked for something that cannot be done; the message is one line that says what, and what to do."""


class Criterion(nn.Module):
    """Per-sample losses of logits: the cross-entropy. Methods that are a loss derive from it.

    Args:
        label_smoothing: from 0 to 1.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return losses of shape [n] of float32 logits, shape [n, classes], for a batch."""
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1."""


class PastOutputs(Criterion):
    """SAF's loss."""

    def __init__(self, label_smoothing: float, num_samples: int, num_classes: int, **settings: Any) -> None:
        super().__init__(label_smoothing)
        self.saf = SAF(num_samples, num_classes, label_smoothing=label_smoothing, reduction="none", **settings)

    def forward(self, logits: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return losses of shape [n] and record the logits."""
        return self.saf(logits, y, ids)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1."""
        self.saf.set_epoch(epoch)


class Teacher(Criterion):
    """MESA's loss; the teacher follows the steps of an optimizer."""

    def __init__(self, label_smoothing: float, model: nn.Module, optimizer: Optimizer, **settings: Any) -> None:
        super().__init__(label_smoothing)
        self.mesa = MESA(model, label_smoothing=label_smoothing, reduction="none", **settings)
        self.mesa.attach(optimizer)

    def forward(self, logits: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return losses of shape [n]."""
        return self.mesa(logits, y, x)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1."""
        self.mesa.set_epoch(epoch)


@dataclass(frozen=True)
class Task:
    """What a criterion may need to know; `sampler` says which samples are this process's, where there are several."""

    model: nn.Module
    optimizer: Optimizer
    num_samples: int
    num_classes: int
    label_smoothing: float
    sampler: SampleToRankSampler | None = None


@dataclass(frozen=True)
class Method:
    """How one method is built, tuned and compared.

    Args:
        summary: one line for `--help`.
        build: returns the optimizer for a model and this method's knobs.
        knobs: its settings with their defaults; each is an option of the command line.
        criterion: returns the loss for a task and this method's knobs; default: cross-entropy.
        base: the method whose step time is 1 in comparisons; None for a base optimizer.
        tuned: the knob that a comparison chooses on held-out data; None for none.
        grid: the values it is chosen from, smallest first.
        note: what the progress line says of the last step, from the optimizer.
    """

    summary: str
    build: Callable[[nn.Module, Knobs], Optimizer]
    knobs: Knobs
    criterion: Callable[[Task, Knobs], Criterion] = lambda task, knobs: Criterion(task.label_smoothing)
    base: str | None = None
    tuned: str | None = None
    grid: tuple[float, ...] = ()
    note: Callable[[Any], str] = lambda optimizer: ""


_SGD_KNOBS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def _sgd(model: nn.Module, knobs: Knobs) -> Optimizer:
    return torch.optim.SGD(model.parameters(), **{knob: knobs[knob] for knob in _SGD_KNOBS})


def _loss_knobs(knobs: Knobs) -> dict[str, Any]:
    return {knob: value for knob, value in knobs.items() if knob not in _SGD_KNOBS}


def _past_outputs(task: Task, knobs: Knobs) -> Criterion:
    sizes = task.num_samples, task.num_classes
    return PastOutputs(task.label_smoothing, *sizes, sampler=task.sampler, **_loss_knobs(knobs))


def _teacher(task: Task, knobs: Knobs) -> Criterion:
    return Teacher(task.label_smoothing, task.model, task.optimizer, **_loss_knobs(knobs))


METHODS: dict[str, Method] = {
    "sgd": Method(
        summary="SGD with momentum",
        build=_sgd,
        knobs=_SGD_KNOBS,
    ),
    "adamw": Method(
        summary="AdamW",
        build=lambda model, knobs: torch.optim.AdamW(model.parameters(), **knobs),
        knobs={"lr": 3e-3, "weight_decay": 0.01},
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
    "saf": Method(
        summary="SGD, each picture compared with the model's own outputs --lag epochs ago, after epoch --start-epoch",
        build=_sgd,
        knobs={**_SGD_KNOBS, "lam": 0.3, "tau": 5.0, "lag": 3, "start_epoch": 5},
        criterion=_past_outputs,
        base="sgd",
        tuned="lam",
        grid=(0.1, 0.3, 1.0, 3.0),
    ),
    "mesa": Method(
        summary="SGD, compared with a moving average of the model, after epoch --start-epoch",
        build=_sgd,
        # the authors' decay of 0.9998 looks back over 5000 steps, eight times as many as the digits' 30 epochs have
        knobs={**_SGD_KNOBS, "lam": 0.8, "tau": 5.0, "decay": 0.995, "start_epoch": 5},
        criterion=_teacher,
        base="sgd",
        tuned="lam",
        grid=(0.1, 0.3, 0.8, 3.0),
    ),
    "msam": Method(
        summary="mSAM around SGD: SAM on each of the --num-shards parts of the batch by itself",
        build=lambda model, knobs: MSAM(model.parameters(), torch.optim.SGD, model=model, **knobs),
        # 16 rows in each shard of the default batch, as the paper's on CIFAR
        knobs={**_SGD_KNOBS, "rho": 0.05, "num_shards": 4},
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


def build_criterion(name: str, task: Task, knobs: Knobs) -> Criterion:
    """Return the loss of a method, or raise InputError if it refuses a knob's value."""
    try:
        return METHODS[name].criterion(task, knobs)
    except (ValueError, TypeError, MemoryError) as error:
        raise InputError(f"{name}: {error}") from error


class BatchLosses:
    """Per-sample losses of a batch, for the step; counts the hits of first forward passes on the side.

    Args:
        model: what computes the logits, shape [n, classes].
        criterion: what computes losses of shape [n] from them.
        amp_dtype: torch.float16 or torch.bfloat16 for autocast, None for none.
        device: where model and batches are.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        criterion: Criterion,
        amp_dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self.model, self.criterion = model, criterion
        self.autocast: Any = nullcontext() if amp_dtype is None else torch.autocast(device.type, amp_dtype)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return float32 losses of shape [n]."""
        with self.autocast:
            logits = self.model(x)
        logits = logits.float()  # 16 bits are too few for a log-softmax
        run = under_way()
        if run is None or run.stage is Stage.ASCENT:
            self.hits += (logits.detach().argmax(dim=1) == y).sum()
        with self.autocast:  # a teacher computes as its model does
            return self.criterion(logits, x, y, ids)


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
