"""A comparison: at each level of label noise choose the tuned options on held-out data, then train methods and seeds.

All runs share one split, so the held-out part that an option is chosen on never meets the test set; the seed decides
weights, label noise and order. The final runs train on the whole training set, held-out part included, and methods
take turns within each seed, so that step times are measured side by side.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fastsam.cli.config import Config, base_of, options_for, options_of, with_options
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, contents_of, make_directory, write_json
from fastsam.cli.flatness import Trained, measure
from fastsam.cli.results import Result, Watcher
from fastsam.cli.training import train
from fastsam.methods import METHODS

PLAN = "compare.json"
FLATNESS = "flatness.json"
FLATNESS_SAMPLES = 2048
"""Training pictures that a run is measured on, at most: on more of them a Hessian costs as much as the training."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides a comparison's numbers; `options` are those given for every method that has them."""

    methods: list[str]
    label_noise: list[float]
    seeds: int
    options: dict[str, Any]
    data: str
    model: str
    epochs: int
    batch_size: int
    label_smoothing: float
    amp: str
    channels_last: bool
    compile: bool
    graph: bool
    device: str
    threads: int
    sharpness: bool = False
    base: str | None = None
    schedule: str = "cosine"
    warmup: float | None = None
    clip: float | None = None
    init: str | None = None
    freeze_bn: bool = False

    def base_of(self, method: str) -> str:
        """Return what a method goes around in this comparison: a key of METHODS, of a base itself its own."""
        return base_of(method, None if METHODS[method].kind == "base" else self.base)

    def config(self, method: str, noise: float, seed: int) -> Config:
        """Return the config of one run with the method's default for what is tuned.

        Args:
            method: a key of METHODS.
            noise: share of training labels that are redrawn, 0 to 1.
            seed: of the weights, the label noise and the order.
        """
        base = self.base_of(method)
        given = {k: v for k, v in self.options.items() if k in options_of(method, base)}
        shared = {f.name: getattr(self, f.name) for f in fields(Config) if f.name in asdict(self)} | {
            "options": options_for(method, given, base),
            "label_noise": noise,
            "base": base,
        }
        return Config(method=method, seed=seed, split_seed=0, scored_on="test", **shared)

    def tunes(self, method: str) -> bool:
        """Whether an option of this method is to be chosen: one is tuned, and no value was given for it."""
        return METHODS[method].tuned is not None and METHODS[method].tuned not in self.options

    def runs(self) -> int:
        """Return the number of runs, those that choose options included."""
        choosing = sum(len(METHODS[m].grid) for m in self.methods if self.tunes(m))
        return len(self.label_noise) * (choosing + self.seeds * len(self.methods))


@dataclass(frozen=True)
class Choice:
    """The value chosen for a tuned option, and the held-out accuracy in percent of each value tried."""

    label_noise: float
    method: str
    tuned: str
    value: float
    held_out_accuracy: dict[str, float]


@dataclass(frozen=True)
class Row:
    """A line of the table: accuracies in percent over the seeds, times as medians; `step_ratio` is to `base`.

    `interval_last` is half of the 95 % interval of the mean, by Student's t; None of a single seed.
    """

    label_noise: float
    method: str
    tuned: str | None
    value: float | None
    mean_last: float
    std_last: float
    interval_last: float | None
    mean_best: float
    step_ms: float
    base: str | None
    step_ratio: float | None
    seconds: float
    sharpness: float | None = None
    lambda_max: float | None = None


@dataclass(frozen=True)
class RunFlatness:
    """Sharpness, largest eigenvalue and its ratio to the fifth of one run's last weights; None where not finite."""

    sharpness: float | None
    lambda_max: float | None
    ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: one result for each noise level, method and seed, and what was measured of each."""

    plan: Plan
    choices: list[Choice]
    results: list[Result]
    flatness: list[RunFlatness] = field(default_factory=list)

    def of(self, noise: float, method: str) -> list[Result]:
        """Return the results of one method at one noise level, one for each seed.

        Args:
            noise: share of redrawn labels, one of the plan's.
            method: a key of METHODS, one of the plan's.
        """
        return [r for r in self.results if r.config.label_noise == noise and r.config.method == method]

    @property
    def rows(self) -> list[Row]:
        """The table, noise level by noise level, methods in the order given."""
        return [self._row(noise, method) for noise in self.plan.label_noise for method in self.plan.methods]

    def _row(self, noise: float, method: str) -> Row:
        results, entry = self.of(noise, method), METHODS[method]
        last = [r.last for r in results]
        step_ms = self._step_ms(noise, method)
        around = self.plan.base_of(method)
        base = around if around != method and around in self.plan.methods else None
        return Row(
            label_noise=noise,
            method=method,
            tuned=entry.tuned,
            value=results[0].config.options[entry.tuned] if entry.tuned else None,
            mean_last=statistics.mean(last),
            std_last=statistics.stdev(last) if len(last) > 1 else 0.0,
            interval_last=interval(last),
            mean_best=statistics.mean(r.best for r in results),
            step_ms=step_ms,
            base=base,
            step_ratio=step_ms / self._step_ms(noise, base) if base else None,
            seconds=statistics.median(r.seconds for r in results),
            sharpness=self._mean_of(noise, method, "sharpness"),
            lambda_max=self._mean_of(noise, method, "lambda_max"),
        )

    def _mean_of(self, noise: float, method: str, name: str) -> float | None:
        """Return the mean of a measure over the seeds; None where it was not taken, or not finite for one of them."""
        here = self.of(noise, method)
        values = [getattr(f, name) for f, r in zip(self.flatness, self.results, strict=False) if r in here]
        return statistics.mean(values) if values and None not in values else None

    def _step_ms(self, noise: float, method: str) -> float:
        return statistics.median(epoch.step_ms for r in self.of(noise, method) for epoch in r.history)


def interval(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % interval of the mean, by Student's t; None of fewer than two values."""
    # takes half a second to import
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def run(plan: Plan, out: Path, watcher: Watcher) -> Comparison:
    """Carry out a plan, finished runs in `out` taken as they are and an unfinished one resumed.

    Args:
        plan: what to compare.
        out: the comparison's directory, as `prepare` left it.
        watcher: hears how each run gets on.

    Returns:
        All results, which an interruption does not change.

    Raises:
        InputError: a run's config cannot work, or a file cannot be written.
    """
    choices: list[Choice] = []
    results: list[Result] = []
    flatness: list[RunFlatness] = []
    for noise in plan.label_noise:
        here = [_choose(plan, noise, method, out, watcher) for method in plan.methods if plan.tunes(method)]
        chosen = {choice.method: {choice.tuned: choice.value} for choice in here}
        choices += here
        for seed in range(plan.seeds):
            for method in plan.methods:
                config = plan.config(method, noise, seed)
                config = replace(config, options=config.options | chosen.get(method, {}))
                results.append(_train(config, out, watcher))
                if plan.sharpness:
                    flatness.append(_flatness(config, out))
    return Comparison(plan, choices, results, flatness)


def _choose(plan: Plan, noise: float, method: str, out: Path, watcher: Watcher) -> Choice:
    """Choose by the held-out accuracy after the last epoch; ties go to the smallest value, the nearest to the base."""
    tuned = str(METHODS[method].tuned)
    accuracy = {}
    for value in METHODS[method].grid:
        config = plan.config(method, noise, seed=0)
        config = replace(config, scored_on="held_out", options=config.options | {tuned: value})
        accuracy[value] = _train(config, out, watcher).last
    # the first of equals
    best = max(accuracy, key=accuracy.__getitem__)
    return Choice(noise, method, tuned, best, {f"{value:g}": a for value, a in accuracy.items()})


def _train(config: Config, out: Path, watcher: Watcher) -> Result:
    return train_in(out / "runs" / _name(config), config, watcher)


def train_in(directory: Path, config: Config, watcher: Watcher) -> Result:
    """Train a run in a directory of its own, go on with one that was interrupted, or return the one that is there.

    Args:
        directory: made if need be.
        config: what to train.
        watcher: hears how the run gets on.

    Raises:
        InputError: the config cannot work, or a file cannot be written.
    """
    make_directory(directory)
    return train(config, directory, resume=(directory / CHECKPOINT).exists(), watcher=watcher)


def _flatness(config: Config, out: Path) -> RunFlatness:
    """Measure a finished run, unless that is done already."""
    path = out / "runs" / _name(config) / FLATNESS
    if not path.exists():
        trained = Trained(path.parent, config.device, FLATNESS_SAMPLES)
        try:
            found = measure(trained, rho=0.05, batch_size=64, eigenvalues=5, tol=1e-2)
            numbers = RunFlatness(found.sharpness, found.eigenvalues[0], found.ratio)
        except InputError:
            # a run whose loss is no longer finite has no Hessian, and does not end the comparison
            numbers = RunFlatness(None, None, None)
        write_json(path, asdict(numbers))
    with contents_of(path):
        return RunFlatness(**json.loads(path.read_text(encoding="utf-8")))


def _name(config: Config) -> str:
    tuned = METHODS[config.method].tuned
    chosen = f"-{tuned}{config.options[tuned]:g}" if tuned else ""
    held_out = "-held-out" if config.scored_on == "held_out" else ""
    return f"noise{config.label_noise:g}-{config.method}{chosen}-seed{config.seed}{held_out}"


def prepare(plan: Plan, out: Path, *, overwrite: bool) -> None:
    """Make the directory of a new comparison and write the plan into it.

    Args:
        plan: what to compare.
        out: its directory, made with its parents.
        overwrite: forget the runs of a comparison that is there.

    Raises:
        InputError: a comparison is there and overwrite is False, or the directory cannot be written.
    """
    prepare_directory(out, PLAN, asdict(plan), overwrite=overwrite)


def prepare_directory(out: Path, file: str, plan: dict[str, Any], *, overwrite: bool) -> None:
    """Make the directory of a new plan and write the plan into it.

    Args:
        out: its directory, made with its parents.
        file: name of the plan's file.
        plan: its fields.
        overwrite: forget the runs that are there.

    Raises:
        InputError: runs of an earlier plan are there and overwrite is False, or the directory cannot be written.
    """
    kind = Path(file).stem.replace("compare", "comparison")
    done = list(out.glob(f"runs/*/{CHECKPOINT}")) if (out / file).exists() else []
    if done:
        if not overwrite:
            raise InputError(
                f"{out} already holds a {kind}; add --resume to finish it, --overwrite to start it afresh, "
                "or choose another --out"
            )
        for path in done:
            path.unlink()
            path.with_name(FLATNESS).unlink(missing_ok=True)
    make_directory(out)
    write_json(out / file, plan)


def read_plan(out: Path) -> Plan:
    """Return the plan of the comparison in `out`, or raise InputError if there is none that can be read."""
    return read_fields(out / PLAN, lambda saved: Plan(**with_options(saved)))


_T = TypeVar("_T")


def read_fields(path: Path, make: Callable[[dict[str, Any]], _T]) -> _T:
    """Return what is made of the fields in a plan's file.

    Args:
        path: the file.
        make: makes the plan of its fields.

    Raises:
        InputError: there is no such file, or it is no such plan.
    """
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(f"nothing to resume: {path} does not exist") from error
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a plan: {error}") from error


def flat(plan: Plan) -> dict[str, Any]:
    """Return the plan's fields with the methods' options among them."""
    return {key: value for key, value in asdict(plan).items() if key != "options"} | plan.options
