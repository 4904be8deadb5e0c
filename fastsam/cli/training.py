"""One training run: built from a `Config`, trained epoch by epoch, and resumed bit for bit from its checkpoint.

Everything random (weights, split, label noise, order, crops and flips of the samples) comes from the seeds in the
config, so a run repeats bit for bit on one machine. With several processes each trains on its own part of the samples,
under DistributedDataParallel, and the first one scores, writes files and prints.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from fastsam import SampleToRankSampler
from fastsam.cli import processes
from fastsam.cli.config import AMP, Config, flat, read_config, refuse_differences, when_of
from fastsam.cli.data import draw_moves, generator, load
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, contents_of, read_checkpoint, write_checkpoint
from fastsam.cli.flatness import Batches, losses_of
from fastsam.cli.initial import start_from
from fastsam.cli.models import batch_norms, build_model, has_batch_norm
from fastsam.cli.results import Epoch, Result, Watcher
from fastsam.cli.steps import BatchLosses, StepClock, Task, build, build_criterion, note_of, schedule_of
from fastsam.graph.captured_step import CaptureError
from fastsam.graph.graph_step import GraphStep, graph_step
from fastsam.graph.plain_step import as_stepper
from fastsam.sharpness import sam_sharpness

# pictures; a forward of them keeps little, so it fits where training does
SCORED_AT_ONCE = 256


class TrainingRun:
    """A run in progress.

    Args:
        config: what to train.
        begins: take the first weights from the config's `init`, which a run that goes on does not read again.

    Raises:
        InputError: the optimizer refuses an option's value, the batch size cannot work, or `init` holds no weights of
            such a model.
    """

    def __init__(self, config: Config, begins: bool = True) -> None:
        self.config, self.device = config, torch.device(config.device)
        # sums are taken in another order with another number
        torch.set_num_threads(config.threads)
        if self.device.type == "cuda":
            # or runs would not repeat
            torch.backends.cudnn.deterministic = True
        # said where a GradScaler skips the first step or a graph takes it; the schedule counts these steps too
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step", category=UserWarning)
        self.data = load(
            config.data,
            seed=config.seed,
            split_seed=config.split_seed,
            label_noise=config.label_noise,
            scored_on=config.scored_on,
            device=self.device,
        )
        torch.manual_seed(config.seed)
        model = build_model(config.model, tuple(self.data.x.shape[1:]), self.data.classes)
        if config.freeze_bn and not has_batch_norm(model):
            raise InputError(f"{config.model} has no batch norm to freeze; leave --freeze-bn out")
        self.drawn_anew: list[str] = []
        """Names of the weights that `init` could not give, since it was trained on other classes."""
        if config.init is not None and begins:
            self.drawn_anew = start_from(Path(config.init), model, self.data.classes)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.sampler: SampleToRankSampler | None = None
        trained: torch.nn.Module = self.model
        if config.ranks > 1:
            self.sampler = SampleToRankSampler(
                len(self.data.x), config.ranks, processes.rank(), seed=config.seed, drop_last=True
            )
            trained = DistributedDataParallel(self.model)
            torch.manual_seed(config.seed + processes.rank())
        # a program for several shapes would depend on which came first, and a resume meets them in another order
        self.compiled: Any = torch.compile(trained, dynamic=False) if config.compile else trained
        self.steps_per_epoch = len(self._batch_sizes())
        when = when_of(config.when, config.epochs * self.steps_per_epoch)
        self.optimizer: Any = build(config.method, trained, config.options, config.base, when)
        smoothing = config.label_smoothing
        task = Task(trained, self.optimizer, len(self.data.x), self.data.classes, smoothing, self.sampler)
        self.criterion = build_criterion(config.method, task, config.options)
        self.scaler = torch.amp.GradScaler(config.device) if config.amp == "fp16" else None
        self.losses = BatchLosses(self.compiled, self.criterion, AMP[config.amp], self.device)
        self._graph_step: GraphStep | None = None
        self.shuffle = generator(config.seed, "order of the samples")
        self.moves = generator(
            config.seed, f"crops and flips of {processes.rank()}" if self.sampler else "crops and flips"
        )
        self.history: list[Epoch] = []
        self.schedule = self._schedule()

    def _schedule(self) -> LRScheduler:
        """Return the schedule of the learning rate, a function of the steps taken, so that nothing of it is saved."""
        done = len(self.history) * self.steps_per_epoch
        return schedule_of(self.optimizer, self.config, self.steps_per_epoch, done)

    def _batch_sizes(self) -> list[int]:
        """Return the sizes of this process's batches in an epoch."""
        n, size = len(self.sampler or self.data.x), self.config.batch_size // self.config.ranks
        sizes = [size] * (n // size) + ([n % size] if n % size else [])
        shards = self.config.options.get("num_shards", 1)
        # the statistics of one picture would go into the running ones with the weight of a full batch
        has_norm = has_batch_norm(self.model) and not self.config.freeze_bn
        smallest, need = (2, "batch norm needs at least 2 samples") if has_norm else (1, "training needs a sample")
        sizes = [s for s in sizes if s >= smallest * shards]
        if not sizes:
            where = f" in each of {shards} shards" if shards > 1 else ""
            raise InputError(f"batch size {size} cannot train {self.config.model}: {need}{where}")
        return sizes

    def train_epoch(self, watcher: Watcher) -> None:
        """Train one epoch, score it, and add it to the history."""
        clock = StepClock(self.device)
        self.losses.begin_epoch()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        # drawn on the CPU for the whole epoch, so that no step waits for them
        order = self._order().to(self.device)
        moves = draw_moves(len(order), self.moves).to(self.device)
        n, size = sum(self._batch_sizes()), self.config.batch_size // self.config.ranks
        self._train_mode()
        self.criterion.set_epoch(len(self.history) + 1)
        begin = time.perf_counter()
        for samples, how in zip(order[:n].split(size), moves[:n].split(size), strict=True):
            batch = self._inputs(self.data.augmented(samples, how)), self.data.y[samples], samples
            start = clock.now()
            loss = self._step(batch)
            if self.scaler is not None:
                self.scaler.update()
            clock.events.append((start, clock.now()))
            self.losses.settle()
            self.schedule.step()
            total += loss * len(samples)
            watcher.step(loss, note_of(self.optimizer))
        step_ms = clock.median_ms()
        seconds = time.perf_counter() - begin
        plain = total if self.losses.cross_entropy is None else self.losses.cross_entropy
        sums = torch.stack([total.double(), self.losses.hits.double(), plain.double()])
        loss_sum, hits, plain_sum = processes.total(sums).tolist()
        n *= self.config.ranks
        is_sum = self.losses.cross_entropy is not None
        self.history.append(
            Epoch(
                epoch=len(self.history) + 1,
                train_loss=loss_sum / n,
                train_accuracy=100 * hits / n,
                accuracy=processes.of_first(self.accuracy() if processes.is_first() else None),
                samples_per_second=n / seconds,
                seconds=seconds,
                step_ms=step_ms,
                sharpness=processes.of_first(self.sharpness() if processes.is_first() else None),
                cross_entropy=plain_sum / n if is_sum else None,
                divergence=(loss_sum - plain_sum) / n if is_sum else None,
            )
        )

    def _train_mode(self) -> None:
        self.model.train()
        if self.config.freeze_bn:
            for norm in batch_norms(self.model):
                norm.eval()

    def _step(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Take a step and return the batch's mean loss, 0-dim on the device."""
        if not self.config.graph:
            stepper = as_stepper(self.optimizer)
            return stepper.step(self.losses, *batch, scaler=self.scaler, clip_grad_norm=self.config.clip)
        if self._graph_step is None:
            try:
                self._graph_step = graph_step(
                    self.optimizer, self.losses, *batch, scaler=self.scaler, clip_grad_norm=self.config.clip
                )
            except (ValueError, RuntimeError) as error:
                raise InputError(f"--graph: {error}") from error
        try:
            return self._graph_step(*batch)
        except CaptureError as error:
            raise InputError(f"--graph: {error}") from error

    def _order(self) -> Tensor:
        """Return this process's samples in this epoch's order, int64 indices into the training set."""
        if self.sampler is None:
            return torch.randperm(len(self.data.x), generator=self.shuffle)
        self.sampler.set_epoch(len(self.history))
        return torch.tensor(list(self.sampler))

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the accuracy in percent on the test set or the held-out part, in eval mode and full precision."""
        self.model.eval()
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        pairs = zip(self.data.score_x.split(SCORED_AT_ONCE), self.data.score_y.split(SCORED_AT_ONCE), strict=True)
        for x, y in pairs:
            hits += (self.model(self._inputs(self.data.normalised(x))).argmax(dim=1) == y).sum()
        return 100 * hits.item() / len(self.data.score_y)

    def sharpness(self) -> float | None:
        """Return by how much the training loss rises along SAM's perturbation of each batch; None unless logged."""
        if not self.config.log_sharpness:
            return None
        batches = Batches(self.data, self.data.x, self.data.y, self.config.batch_size, self.layout)
        return sam_sharpness(self.model, losses_of(self.model), batches).value

    def _inputs(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.layout)

    def save(self, path: Path) -> None:
        """Write a checkpoint, or leave the one that is there if that fails or is interrupted; all processes call it."""
        own = processes.gathered(self._own_state())
        if not processes.is_first():
            return
        parts = {
            "config": asdict(self.config),
            "history": [epoch.numbers() for epoch in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "of each process": own,
        }
        write_checkpoint(path, parts)

    def _own_state(self) -> dict[str, Any]:
        """Return what another process has otherwise."""
        return {
            "criterion": self.criterion.state_dict(),
            "random": {
                "shuffle": self.shuffle.get_state(),
                "moves": self.moves.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same config, as if there had been no interruption."""
        own = checkpoint["of each process"][processes.rank()]
        self.history = [Epoch(**epoch) for epoch in checkpoint["history"]]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.schedule = self._schedule()
        self.criterion.load_state_dict(own["criterion"])
        if self.scaler is not None:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.shuffle.set_state(own["random"]["shuffle"])
        self.moves.set_state(own["random"]["moves"])
        torch.set_rng_state(own["random"]["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["random"]["cuda"], self.device)


def train(config: Config, out: Path, *, resume: bool = False, watcher: Watcher | None = None) -> Result:
    """Train one run with a checkpoint at the start and after every epoch.

    Args:
        config: what to train.
        out: an existing directory for the checkpoint.
        resume: go on from the checkpoint in `out`, whose config must be this one.
        watcher: hears how the run gets on.

    Returns:
        The config and one `Epoch` for each epoch, those before the interruption included.

    Raises:
        InputError: the config cannot work, or the checkpoint is missing, broken or of another config, or the model
            cannot be compiled here.
    """
    watcher = watcher or Watcher()
    path = out / CHECKPOINT
    with contents_of(path) if resume else nullcontext():
        run = TrainingRun(config, begins=not resume)
    if resume:
        checkpoint = read_checkpoint(path)
        refuse_differences(path, flat(read_config(checkpoint, path)), flat(config))
        with contents_of(path):
            run.load(checkpoint)
    else:
        run.save(path)
    watcher.started(config, run.history, run.steps_per_epoch)
    if run.drawn_anew:
        watcher.told(f"{', '.join(run.drawn_anew)}: drawn anew, since {config.init} has other classes")
    while len(run.history) < config.epochs:
        with _compiling(config):
            run.train_epoch(watcher)
        run.save(path)
        watcher.epoch(config, run.history[-1])
    return Result(config, tuple(run.history))


@contextmanager
def _compiling(config: Config) -> Iterator[None]:
    if not config.compile:
        yield
        return
    # takes seconds to import
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        reason = str(error.inner_exception).partition("\n")[0]
        raise InputError(
            f"{config.model} cannot be compiled here: {reason}; mend that, or leave --compile out"
        ) from error
