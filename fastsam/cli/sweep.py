"""A sweep: one method with one or two options at several values each, over seeds, on a comparison's machinery.

By default the runs are scored on the held-out tenth of the training set, so that a value chosen here has not met the
test set; all share one split, and the seed decides weights, label noise and order.
"""

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastsam.cli.compare import interval, prepare_directory, read_fields, train_in
from fastsam.cli.config import Config, base_of, options_for, options_of
from fastsam.cli.results import Result, Watcher

PLAN = "sweep.json"
SWEPT_FIELDS = ("epochs", "batch_size", "base", "schedule", "warmup", "clip", "label_smoothing", "label_noise")
"""What may take several values beside the methods' options."""

Point = dict[str, Any]
"""A value for each option that is swept."""


@dataclass(frozen=True)
class SweepPlan:
    """Everything that decides a sweep's numbers.

    Args:
        over: the values of each option that takes several, in order.
        seeds: runs of each point.
        options: those of the method that were given one value.
        settings: further fields of each run's config.
    """

    over: dict[str, list[Any]]
    seeds: int
    options: dict[str, Any]
    settings: dict[str, Any]

    def points(self) -> list[Point]:
        """Return all combinations, the last option's values next to each other."""
        return [dict(zip(self.over, values, strict=True)) for values in itertools.product(*self.over.values())]

    def config(self, point: Point, seed: int) -> Config:
        """Return the config of one run.

        Args:
            point: one of `points()`.
            seed: of the weights, the label noise and the order.

        Raises:
            InputError: the method has no such option, or the config cannot work.
        """
        settings = self.settings | {name: value for name, value in point.items() if name in SWEPT_FIELDS}
        method = settings["method"]
        base = base_of(method, settings["base"])
        swept = {name: value for name, value in point.items() if name not in SWEPT_FIELDS}
        # an option that the other base does not have is not that base's
        given = {name: value for name, value in self.options.items() if name in options_of(method, base)}
        options = options_for(method, given | swept, base)
        return Config(**settings | {"options": options, "seed": seed, "split_seed": 0})

    def runs(self) -> int:
        """Return the number of runs."""
        return len(self.points()) * self.seeds


@dataclass(frozen=True)
class SweepRow:
    """A line of the table: accuracies in percent over the seeds, times as medians.

    `interval_last` is half of the 95 % interval of the mean, by Student's t; None of a single seed.
    """

    point: Point
    mean_last: float
    interval_last: float | None
    mean_best: float
    step_ms: float
    seconds: float


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: one result for each point and seed."""

    plan: SweepPlan
    points: list[Point]
    results: list[Result]

    @property
    def rows(self) -> list[SweepRow]:
        """The table, point by point."""
        return [self._row(point) for point in self.plan.points()]

    @property
    def highest(self) -> SweepRow:
        """The point with the highest mean after the last epoch; the first of equals."""
        return max(self.rows, key=lambda row: row.mean_last)

    def _row(self, point: Point) -> SweepRow:
        results = [result for at, result in zip(self.points, self.results, strict=True) if at == point]
        last = [result.last for result in results]
        return SweepRow(
            point=point,
            mean_last=statistics.mean(last),
            interval_last=interval(last),
            mean_best=statistics.mean(result.best for result in results),
            step_ms=statistics.median(epoch.step_ms for result in results for epoch in result.history),
            seconds=statistics.median(result.seconds for result in results),
        )


def run(plan: SweepPlan, out: Path, watcher: Watcher) -> Sweep:
    """Carry out a plan, finished runs in `out` taken as they are and an unfinished one resumed.

    Args:
        plan: what to train.
        out: the sweep's directory, as `prepare` left it.
        watcher: hears how each run gets on.

    Returns:
        All results, which an interruption does not change.

    Raises:
        InputError: a run's config cannot work, or a file cannot be written.
    """
    points, results = [], []
    for seed, point in _runs(plan):
        directory = out / "runs" / f"{words(point, '-')}-seed{seed}".replace(" ", "")
        points.append(point)
        results.append(train_in(directory, plan.config(point, seed), watcher))
    return Sweep(plan, points, results)


def _runs(plan: SweepPlan) -> Iterator[tuple[int, Point]]:
    """Yield the runs, points taking turns within each seed, so that step times are measured side by side."""
    for seed in range(plan.seeds):
        for point in plan.points():
            yield seed, point


def words(point: Point, between: str = ", ") -> str:
    """Return a point as text.

    Args:
        point: its values by option.
        between: what separates them.
    """
    return between.join(f"{name} {shown(value)}" for name, value in point.items())


def shown(value: Any) -> str:
    """Return a value as short as it can be read back."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def prepare(plan: SweepPlan, out: Path, *, overwrite: bool) -> None:
    """Make the directory of a new sweep and write the plan into it.

    Args:
        plan: what to train.
        out: its directory, made with its parents.
        overwrite: forget the runs of a sweep that is there.

    Raises:
        InputError: a sweep is there and overwrite is False, or the directory cannot be written.
    """
    prepare_directory(out, PLAN, asdict(plan), overwrite=overwrite)


def read_plan(out: Path) -> SweepPlan:
    """Return the plan of the sweep in `out`, or raise InputError if there is none that can be read."""
    return read_fields(out / PLAN, lambda saved: SweepPlan(**saved))


def flat(plan: SweepPlan) -> dict[str, Any]:
    """Return the plan's settings by the names of the command's options."""
    return {"over": plan.over, "seeds": plan.seeds, **plan.settings, **plan.options}
