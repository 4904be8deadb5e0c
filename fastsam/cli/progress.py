"""How a run gets on, shown on the terminal."""

import math
import time
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastsam.cli.config import Config
from fastsam.cli.data import SCORED_ON
from fastsam.cli.results import Epoch, Watcher

_B = TypeVar("_B", bound="_Bar")


class _Bar:
    """A progress bar that is there on a terminal alone.

    Args:
        console: where to.
        transient: take the bar away at the end.
    """

    def __init__(self, console: Console, transient: bool = False) -> None:
        self.console = console
        # a short bar, so that a line fits into 80 columns
        columns = BarColumn(10), TextColumn("{task.description}"), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=transient)

    def __enter__(self: _B) -> _B:
        # Where there is no terminal rich before 14.3 prints an empty line for a bar that is disabled.
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()


class Display(_Bar, Watcher):
    """A progress bar on a terminal; elsewhere plain lines, one for each epoch or each of several runs, and each minute.

    What it says within an epoch is also how long one takes.
    """

    def __init__(self, console: Console, runs: int) -> None:
        super().__init__(console)
        self.runs, self.run = runs, 0
        self.all_runs = self.bar.add_task("", visible=runs > 1, total=None)
        self.this_run = self.bar.add_task("", total=None)
        self.numbers, self.note = "", ""
        self.epochs = self.this_epoch = self.steps = self.done = 0
        self.began = self.next_look = 0.0
        # seconds from one look at the loss to the next
        self.pause = 0.25 if console.is_terminal else 60.0

    def started(self, config: Config, history: list[Epoch], steps_per_epoch: int) -> None:
        """Start the run's bar where the run starts."""
        self.run += 1
        self.epochs, self.steps = config.epochs, steps_per_epoch
        self._start_epoch(len(history) + 1)
        self.numbers = _numbers(config, history[-1]) if history else ""
        total, done = config.epochs * steps_per_epoch, len(history) * steps_per_epoch
        self.bar.reset(self.this_run, total=total, completed=done, description=self.numbers or "starting")
        description = f"{self.run}/{self.runs}  {_label(config)}"
        self.bar.update(self.all_runs, total=self.runs * config.epochs, description=description)
        self.bar.advance(self.all_runs, len(history))
        if self.runs == 1:
            goes_on = f", goes on after epoch {len(history)} of {config.epochs}" if history else ""
            self.console.print(f"{config.data}, {config.model}, {_label(config)}, {config.device}{goes_on}")
        if len(history) == config.epochs:
            self._finished(config, history[-1])

    def told(self, message: str) -> None:
        """Print it, of a run by itself."""
        if self.runs == 1:
            self.console.print(message)

    def step(self, loss: Tensor, note: str) -> None:
        """Advance the bar, with a look at the loss now and then, since a look waits for the device."""
        self.note, self.done = f"{note}  " if note else "", self.done + 1
        self.bar.advance(self.this_run)
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + self.pause
        minutes, seconds = divmod(round((now - self.began) / self.done * self.steps), 60)
        pace, numbers = f"an epoch takes {minutes}:{seconds:02d} min", f"loss {loss.item():.3f}  {self.note}"
        if self.console.is_terminal:
            self.bar.update(self.this_run, description=numbers + (self.numbers or pace))
        else:
            run = f"{self.run}/{self.runs}  " if self.runs > 1 else ""
            where = f"epoch {self.this_epoch}/{self.epochs}, step {self.done}/{self.steps}"
            self.console.print(f"{run}{where}  {numbers}{pace}")

    def epoch(self, config: Config, epoch: Epoch) -> None:
        """Show the epoch's numbers."""
        self.numbers = _numbers(config, epoch)
        self._start_epoch(epoch.epoch + 1)
        self.bar.advance(self.all_runs)
        if self.runs == 1 and not self.console.is_terminal:
            loss = f"loss {epoch.train_loss:.3f}"
            self.console.print(f"epoch {epoch.epoch}/{config.epochs}  {loss}  {self.note}{self.numbers}")
        if epoch.epoch == config.epochs:
            self._finished(config, epoch)

    def _start_epoch(self, number: int) -> None:
        self.this_epoch, self.done, self.began = number, 0, time.monotonic()
        self.next_look = self.began + (0 if self.console.is_terminal else self.pause)

    def _finished(self, config: Config, epoch: Epoch) -> None:
        if self.runs > 1:
            scored = SCORED_ON[config.scored_on]
            self.console.print(f"{self.run}/{self.runs}  {_label(config)}: {scored} accuracy {epoch.accuracy:.1f} %")
        if not math.isfinite(epoch.train_loss):
            self.console.print(f"{_label(config)}: the loss is no longer finite; try a smaller --lr")


def _label(config: Config) -> str:
    return f"{config.label}, noise {config.label_noise:.0%}, seed {config.seed}"


def _numbers(config: Config, epoch: Epoch) -> str:
    accuracies = f"train {epoch.train_accuracy:.1f} %  {SCORED_ON[config.scored_on]} {epoch.accuracy:.1f} %"
    return f"{accuracies}  {epoch.samples_per_second:,.0f} samples/s"


def make_console() -> Console:
    """Return the console of a command; where it is no terminal, lines are at least 100 characters long."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 100))


class Measuring(_Bar):
    """A progress bar for measures on a terminal; elsewhere a line for each one that begins.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, transient=True)
        self.task = self.bar.add_task("", total=None)

    def stage_of(self, label: str) -> Callable[[str], Callable[[int, int | None], None]]:
        """Return `stage` for the measures of one model."""
        return lambda name: self.stage(f"{label}: {name}")

    def stage(self, name: str) -> Callable[[int, int | None], None]:
        """Begin to show a measure by its name; what is returned is told how far it is."""
        if not self.console.is_terminal:
            self.console.print(f"measuring: {name}")
        self.bar.reset(self.task, total=None, description=name)

        def tell(done: int, total: int | None) -> None:
            count = f"{name} {done}" + (f"/{total}" if total else "")
            self.bar.update(self.task, completed=done, total=total, description=count)

        return tell
