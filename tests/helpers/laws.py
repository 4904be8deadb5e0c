"""Laws: tests that hold for every method, base optimizer and way of taking a step.

A cell is a row of fastsam.methods with one of its variants, a base and a way. CI meets each law in a set of cells in
which every pair of row, base and way occurs, and every variant; `pytest --all-cells` takes all cells. Triton's kernels
meet it in a few. What a law leaves out it says, with the reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

from methods import BASES, WAYS

from fastsam.methods import METHODS


class Subject(NamedTuple):
    """A row of the table, one of its variants, and for a loss the row whose optimizer trains with it, if not a base."""

    row: str
    variant: str = "default"
    inside: str | None = None

    def __str__(self):
        return (
            self.row
            + (f", {self.variant}" if self.variant != "default" else "")
            + (f" in {self.inside}" if self.inside else "")
        )

    @property
    def optimizer(self):
        """The row of kind "optimizer" that takes the steps; None for a base that does."""
        return self.row if METHODS[self.row].kind == "optimizer" else self.inside

    @property
    def loss(self):
        """The row of kind "loss", if any."""
        return self.row if METHODS[self.row].kind == "loss" else None

    @property
    def ways(self):
        ways = METHODS[self.inside].ways if self.inside else METHODS[self.row].variants[self.variant].ways
        # SAF refuses the first call, after which nobody could tell the passes apart
        return tuple(way for way in ways if not (self.loss == "saf" and way == "two_steps"))


class Cell(NamedTuple):
    """Where a law is met; `cls` stands in for the row's class in tests that plant a fault."""

    subject: Subject
    base: str
    way: str
    backend: str = "torch"
    cls: Any = None

    def __str__(self):
        return f"{self.subject}-{self.base}-{self.way}-{self.backend}"

    @property
    def met(self):
        """What a law has met when it has met this cell: the three pairs of row, base and way, and the variant."""
        row = f"{self.subject.row} in {self.subject.inside}"
        return {*combinations((("row", row), ("base", self.base), ("way", self.way)), 2), self.subject}

    @property
    def options(self):
        """Options of the variant."""
        row = METHODS[self.subject.row]
        return {**row.options, **row.fixed, **row.variants[self.subject.variant].options}


def subjects():
    """Every row and variant; rows of kind "base" are the bases themselves."""
    found = [Subject(name, variant) for name, row in METHODS.items() if row.kind != "base" for variant in row.variants]
    return [*found, *(Subject(name, "default", "sam") for name, row in METHODS.items() if row.kind == "loss")]


@cache
def all_cells():
    """The full product."""
    return tuple(Cell(s, base, way) for s in subjects() for base in BASES for way in WAYS if way in s.ways)


def covering(cells):
    """Return a small part of these cells that meets each pair of row, base and way, and each variant, that they do."""
    left, chosen = set().union(*(cell.met for cell in cells)), []
    while left:
        best = max(cells, key=lambda cell: len(cell.met & left))  # the first of equals
        chosen.append(best)
        left -= best.met
    return sorted(chosen, key=cells.index)


def few(cells):
    """Return one cell for each row, with bases and ways in turn."""
    by_row = {}
    for cell in cells:
        by_row.setdefault((cell.subject.row, cell.subject.inside), []).append(cell)
    return [of_row[(5 * i) % len(of_row)] for i, of_row in enumerate(by_row.values())]


@dataclass(frozen=True)
class Law:
    """Which cells a law takes.

    Args:
        skips: why a cell is left out, and which: predicates of a cell by the reason.
        backends: the first for every cell of a run, the other for a few.
    """

    skips: Mapping[str, Callable[[Cell], Any]]
    backends: tuple[str, ...]

    def reasons(self, cell):
        """Why the law leaves this cell out; empty if it does not."""
        return [reason for reason, leaves_out in self.skips.items() if leaves_out(cell)]

    @property
    def kept(self):
        return [cell for cell in all_cells() if not self.reasons(cell)]

    def cells(self, every):
        """The cells of a run: every one or a covering set on the first backend, a few on the other."""
        first, *others = self.backends
        chosen = [cell._replace(backend=first) for cell in (self.kept if every else covering(self.kept))]
        return [*chosen, *(cell._replace(backend=other) for other in others for cell in few(self.kept))]


LAWS: dict[str, Law] = {}
"""All laws that have been imported, by the names of their tests."""


def law(skips=None, backends=("torch",)):
    """Make a law of a test that takes a `cell`; with "triton" where kernels of ours have a part in it."""

    def register(test):
        LAWS[f"{test.__module__.rpartition('.')[2]}.{test.__name__}"] = test.law = Law(skips or {}, backends)
        return test

    return register


def takes_plain_steps(cell):
    """Whether a plain torch optimizer takes the steps."""
    return cell.subject.optimizer is None


PLAIN = {"a torch optimizer takes the steps, and keeps no promise of ours": takes_plain_steps}
"""A skip of laws about what a fastsam optimizer does beside the base's step."""
