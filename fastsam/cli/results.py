"""What is known of a run: its epochs while it goes on, and the whole of it at the end."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fastsam.cli.config import Config


@dataclass(frozen=True)
class Epoch:
    """What is known of one epoch. Accuracies in percent; `seconds` are those of the training steps alone.

    Train loss and accuracy are those of each step's first forward pass, against the labels trained on, noisy ones and
    all; `accuracy` is that of the test set, or of the held-out part, after the epoch. `step_ms` is the median step.
    `sharpness` is by how much the training loss rises within rho = 0.05 after the epoch, where it was measured.
    `cross_entropy` and `divergence` are the parts of the train loss of SAF and MESA.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    accuracy: float
    samples_per_second: float
    seconds: float
    step_ms: float
    sharpness: float | None = None
    cross_entropy: float | None = None
    divergence: float | None = None

    def numbers(self) -> dict[str, Any]:
        """Return what is known of it by name, without what was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Result:
    """A finished run."""

    config: Config
    history: tuple[Epoch, ...]

    @property
    def last(self) -> float:
        """Accuracy after the last epoch, in percent."""
        return self.history[-1].accuracy

    @property
    def best(self) -> float:
        """Highest accuracy of any epoch, in percent: chosen by looking at the very set it is measured on."""
        return max(epoch.accuracy for epoch in self.history)

    @property
    def seconds(self) -> float:
        """Seconds spent in training steps."""
        return sum(epoch.seconds for epoch in self.history)

    @property
    def step_ms(self) -> float:
        """Median over the epochs of the median step, in milliseconds."""
        return statistics.median(epoch.step_ms for epoch in self.history)


class Watcher:
    """Is told how a run gets on; this one does nothing."""

    def started(self, config: Config, history: list[Epoch], steps_per_epoch: int) -> None:
        """A run begins, or goes on.

        Args:
            config: of the run.
            history: its epochs so far.
            steps_per_epoch: of this process.
        """

    def told(self, message: str) -> None:
        """The run has something to say once, a line."""

    def step(self, loss: Tensor, note: str) -> None:
        """A step was taken.

        Args:
            loss: mean of the batch, 0-dim on the run's device.
            note: what the method says of the step.
        """

    def epoch(self, config: Config, epoch: Epoch) -> None:
        """An epoch is over and its checkpoint written.

        Args:
            config: of the run.
            epoch: its numbers.
        """
