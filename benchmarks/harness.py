"""What all benchmarks share: rounds in which arms take turns, ratios and noise, options, and the record of a run."""

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from benchmarks.environment import environment
from fastsam.cli.files import make_directory, write_json
from fastsam.cli.options import Several

T = TypeVar("T")


def interleaved(arms: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run each arm once in every round, in an order that changes from round to round, so that drifts hit all alike.

    Args:
        arms: by name, what takes and returns one sample.
        rounds: how many samples of each.

    Returns:
        Samples by arm, round by round. The order is the same in every run, and in every process of a group.
    """
    samples: dict[str, list[T]] = {name: [] for name in arms}
    for i in range(rounds):
        for name in random.Random(i).sample(list(arms), len(arms)):
            samples[name].append(arms[name]())
    return samples


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return what one arm's samples are over another's, round by round."""
    return [t / o for t, o in zip(times, others, strict=True)]


def over(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios within a round, to three digits."""
    return round(statistics.median(ratios(times, others)), 3)


def noise(again: Sequence[float], times: Sequence[float]) -> list[float]:
    """Return between which ratios a second arm of the same work fell, 1 among them: what differs by less is noise."""
    found = ratios(again, times)
    return [round(min(1.0, *found), 3), round(max(1.0, *found), 3)]


class Key(click.ParamType):
    """A key of a table, in which + stands for a comma."""

    def __init__(self, kind: str, table: Mapping[str, Any]) -> None:
        self.name, self.table = kind, table

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the key, or fail with a list of those there are."""
        key = value.replace("+", ",")
        if key not in self.table:
            self.fail(f"unknown {self.name} {key!r}; choose from {'; '.join(self.table)}", param, ctx)
        return key


def names(flag: str, kind: str, known: Mapping[str, Any], default: Iterable[str], about: str = "") -> Callable:
    """Return an option that takes keys of a table, joined by commas.

    Args:
        flag: the option, as `--models`.
        kind: what a key names, for `--help` and errors.
        known: the table.
        default: the keys without the option.
        about: more for `--help`.
    """
    text = ",".join(name.replace(",", "+") for name in default)
    commas = ", with + for a comma in a name" if any("," in name for name in known) else ""
    listed = f"Of {'; '.join(known)}. Joined by commas{commas}."
    return click.option(flag, type=Several(Key(kind, known)), default=text, help=f"{about} {listed}".strip())


def numbers(flag: str, default: str, item: click.ParamType, about: str) -> Callable:
    """Return an option that takes numbers, joined by commas."""
    return click.option(flag, type=Several(item), default=default, show_default=True, help=about)


def rounds_option(default: int | None, least: int = 1, about: str = "Samples of each arm.") -> Callable:
    """Return the option `--rounds`."""
    return click.option(
        "--rounds", type=click.IntRange(min=least), default=default, show_default=default is not None, help=about
    )


def out_option(about: str = "JSON file for the results.") -> Callable:
    """Return the option `--out`."""
    return click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help=about)


def about_this_run(device: str) -> dict[str, Any]:
    """Describe the machine, the software and the command that is being run."""
    return environment(device, click.get_current_context().obj)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write what a run has found, the whole file or none.

    Args:
        path: the JSON file; folders on the way are made.
        record: `about_this_run` as "environment", and the rows.

    Raises:
        InputError: the file cannot be written.
    """
    make_directory(path.parent)
    write_json(path, record)
