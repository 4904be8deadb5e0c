"""What a step of a training run needs: the method's optimizer and loss, a batch's per-sample losses, and a clock."""

import math
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
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from fastsam import SampleToRankSampler
from fastsam.cli.config import Config, base_of
from fastsam.cli.errors import InputError
from fastsam.methods import METHODS
from fastsam.schedule import Schedule
from fastsam.two_pass import capture
from fastsam.two_pass.stage import Stage, under_way


class Criterion(nn.Module):
    """Per-sample losses of logits: the cross-entropy. Methods that are a loss derive from it.

    Args:
        label_smoothing: from 0 to 1.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return the losses of a batch.

        Args:
            logits: float32 of shape [n, classes].
            x: the model's inputs, shape [n, channels, height, width].
            y: int64 labels of shape [n].
            ids: int64 numbers of the samples, shape [n].

        Returns:
            Losses of shape [n].
        """
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1."""


@dataclass(frozen=True)
class Task:
    """What a criterion may need to know; `sampler` says which samples are this process's, where there are several."""

    model: nn.Module
    optimizer: Optimizer
    num_samples: int
    num_classes: int
    label_smoothing: float
    sampler: SampleToRankSampler | None = None


class MethodLoss(Criterion):
    """The loss of a method of kind "loss", under the method's name.

    Args:
        name: a key of METHODS.
        task: what is trained. A loss that follows the optimizer's steps is attached to its optimizer.
        options: the method's own.
    """

    def __init__(self, name: str, task: Task, options: Mapping[str, Any]) -> None:
        super().__init__(task.label_smoothing)
        self.name, self.needs = name, METHODS[name].loss_needs
        sampler = {"sampler": task.sampler} if "sample_ids" in self.needs else {}
        loss: Any = METHODS[name].build_loss(
            model=task.model,
            num_samples=task.num_samples,
            num_classes=task.num_classes,
            label_smoothing=task.label_smoothing,
            reduction="none",
            **sampler,
            **options,
        )
        if hasattr(loss, "attach"):
            loss.attach(task.optimizer)
        self.add_module(name, loss)

    @property
    def loss(self) -> Any:
        """The method's own module."""
        return self.get_submodule(self.name)

    def forward(self, logits: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return losses of shape [n], as `Criterion` does."""
        given = {"inputs": x, "sample_ids": ids}
        return self.loss(logits, y, *(given[need] for need in self.needs))

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1."""
        self.loss.set_epoch(epoch)


def build(
    name: str,
    model: nn.Module,
    options: Mapping[str, Any],
    base: str | None = None,
    when: Schedule | None = None,
) -> Optimizer:
    """Return the optimizer of a method.

    Args:
        name: a key of METHODS.
        model: the module that is trained, or its wrapper.
        options: all of the method, those of its base among them.
        base: what `base_of` takes.
        when: which steps perturb, of a method of kind "optimizer"; None for all.

    Raises:
        InputError: the method refuses an option's value.
    """
    method = METHODS[name]
    around = METHODS[base_of(name, base)]
    of_base = {option: options[option] for option in around.options}
    own = {**_own(name, options), "when": when} if method.kind == "optimizer" else {}
    try:
        return method.build(model.parameters(), around.cls, model=model, base_options=of_base, **own)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name}: {error}") from error


def build_criterion(name: str, task: Task, options: Mapping[str, Any]) -> Criterion:
    """Return the loss of a method.

    Args:
        name: a key of METHODS.
        task: what is trained.
        options: all of the method, those of its base among them.

    Raises:
        InputError: the method refuses an option's value.
    """
    if METHODS[name].kind != "loss":
        return Criterion(task.label_smoothing)
    try:
        return MethodLoss(name, task, _own(name, options))
    except (ValueError, TypeError, MemoryError) as error:
        raise InputError(f"{name}: {error}") from error


def _own(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {option: options[option] for option in METHODS[name].options}


def schedule_of(optimizer: Optimizer, config: Config, steps_per_epoch: int, done: int) -> LRScheduler:
    """Return the schedule of the learning rate, a function of the steps taken alone.

    "cosine" rises linearly to the rate over the warm-up and falls to 0 along a cosine; "onecycle" is torch's one cycle,
    which rises from a 25th of the rate along a cosine and falls to a 250,000th, the momentum constant.

    Args:
        optimizer: its groups get their `initial_lr` here.
        config: says rate, epochs and warm-up.
        steps_per_epoch: steps of the optimizer, and of the schedule, in each epoch.
        done: steps taken already.
    """
    rate, epochs, warmup = config.options["lr"], config.epochs, config.rises_for
    if config.schedule == "onecycle":
        total = epochs * steps_per_epoch
        if warmup / epochs * total == 1:
            # torch would divide by the steps between its first and its last of the rise
            raise InputError(f"--warmup {warmup:g} is a single step here, over which no rate rises; ask for more, or 0")
        if done:
            # what torch writes into the groups of a run that begins
            _set_groups(optimizer, initial_lr=rate / 25, max_lr=rate, min_lr=rate / 25 / 1e4)
        share = float(warmup / epochs)
        return OneCycleLR(optimizer, rate, total, pct_start=share, cycle_momentum=False, last_epoch=done - 1)
    _set_groups(optimizer, initial_lr=rate)

    def factor(step: int) -> float:
        epoch, in_epoch = divmod(step, steps_per_epoch)
        passed = epoch + in_epoch / steps_per_epoch
        if passed < warmup:
            # no step is for nothing: the first one has a rate, and the first after the warm-up the whole
            return (passed + 1 / steps_per_epoch) / (warmup + 1 / steps_per_epoch)
        return 0.5 * (1 + math.cos(math.pi * (passed - warmup) / (epochs - warmup)))

    return LambdaLR(optimizer, factor, last_epoch=done - 1)


def _set_groups(optimizer: Optimizer, **values: float) -> None:
    for group in optimizer.param_groups:
        group.update(values)


def note_of(optimizer: Any) -> str:
    """Return what the progress line says of the last step: of ESAM, the share of rows in its second pass."""
    fraction = getattr(optimizer, "last_selected_fraction", None)
    return "" if fraction is None else f"rows {fraction:.0%}"


class BatchLosses:
    """Per-sample losses of a batch, for the step; on the side counts the hits of first forward passes.

    Where the method is a loss, which may be more than the cross-entropy, that of first passes is added up too.

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
        self.cross_entropy: Tensor | None = None
        """Sum over the samples, where it is not the loss itself."""
        if isinstance(criterion, MethodLoss):
            self.cross_entropy = torch.zeros((), dtype=torch.float32, device=device)
        self._unsettled: tuple[Tensor, Tensor] | None = None
        """Logits and labels of the first pass, until their cross-entropy is added up."""

    def begin_epoch(self) -> None:
        """Count anew."""
        self.hits.zero_()
        if self.cross_entropy is not None:
            self.cross_entropy.zero_()

    def settle(self) -> None:
        """Add up the cross-entropy of the step that was taken: after its end, since its time is that of the method."""
        if self.cross_entropy is None or self._unsettled is None:
            return
        (logits, y), self._unsettled = self._unsettled, None
        plain = F.cross_entropy(logits, y, reduction="none", label_smoothing=self.criterion.label_smoothing)
        self.cross_entropy += plain.mean() * len(y)

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Return float32 losses of shape [n]."""
        with self.autocast:
            logits = self.model(x)
        # 16 bits are too few for a log-softmax
        logits = logits.float()
        run = under_way()
        if run is None or run.stage is Stage.ASCENT:
            self.hits += (logits.detach().argmax(dim=1) == y).sum()
            if self.cross_entropy is not None:
                self._unsettled = logits.detach(), y
                if capture.current() is not None:
                    # a replay does what was captured, and nothing after it
                    self.settle()
        # a teacher computes as its model does
        with self.autocast:
            return self.criterion(logits, x, y, ids)


class StepClock:
    """Times single steps; on a GPU by events, so that nothing waits for it before the epoch's end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.events: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """Return a point in time for `events`, which holds the begin and end of each step."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median_ms(self) -> float:
        """Return the median step in milliseconds; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in self.events)
        return 1e3 * statistics.median(end - start for start, end in self.events)
