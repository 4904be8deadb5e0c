"""Schedules for `when=`: in which steps a method perturbs, and with how much of its radius.

    rho_t = scale(t) rho;   scale(t) = 0: the step is the base optimizer's, of one forward and backward

t counts the optimizer's steps, taken or skipped, from 0. `Every`, `Last` and `First` are functions of t alone, so that
a run that goes on from a checkpoint goes on in its phase. Shares of a run of T steps are rounded as floor(x + 0.5):

    Every(n)          t mod n == 0
    Last(f, T, r)     t >= start, start = floor((1 - f) T + 0.5);   scale = min(1, (t - start + 1) / r) where r > 0
    First(f, T)       t < end,    end = floor(f T + 0.5)
"""

import math
from typing import Any, Protocol

from fastsam.arguments import LARGEST_INTEGER, check_integer, check_number, shown


class Schedule(Protocol):
    """What `when=` takes. It may also say `total_steps`, an integer: the length of the run that it was made for."""

    def scale(self, step: int) -> float:
        """Return what rho is multiplied by in a step, in [0, 1]; 0 for a step of the base optimizer.

        Args:
            step: how many steps came before it, taken or skipped.
        """


class Every:
    """Perturb in every n-th step, of which the first is one.

    Args:
        n: at least 1, which perturbs in all steps.

    Raises:
        TypeError: n is no integer.
        ValueError: n is below 1.
    """

    def __init__(self, n: int) -> None:
        check_integer("n", n, 1, LARGEST_INTEGER)
        self.n = n

    def __repr__(self) -> str:
        return f"Every({self.n})"

    def scale(self, step: int) -> float:
        """Return 1 in every n-th step, else 0; see `Schedule.scale`."""
        return float(step % self.n == 0)


class Last:
    """Perturb in the last part of a run, until its end and beyond, should it be longer than was said.

    Args:
        fraction: of the run, in (0, 1].
        total_steps: the optimizer's steps in the whole run, those before a checkpoint included.
        ramp: so many steps over which rho grows to its value from the start on, by an equal amount each. Default 0.
        total_epochs: in place of total_steps, with steps_per_epoch: then the part begins with an epoch.
        steps_per_epoch: see total_epochs.

    Raises:
        TypeError: a number is none.
        ValueError: fraction outside (0, 1], no length of the run or two, a length below 1, a negative ramp, or a
            fraction that rounds to no step or no epoch at all.
    """

    def __init__(
        self,
        fraction: float,
        total_steps: int | None = None,
        ramp: int = 0,
        total_epochs: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        check_number("fraction", fraction, lambda share: 0 < share <= 1, "in (0, 1]")
        units, size = _length("Last", total_steps, total_epochs, steps_per_epoch)
        check_integer("ramp", ramp, 0, LARGEST_INTEGER)
        self.fraction, self.ramp = fraction, ramp
        self.start, self.total_steps = _rounded((1 - fraction) * units) * size, units * size
        if self.start == self.total_steps:
            raise ValueError(_never("Last", fraction, units, size))

    def __repr__(self) -> str:
        return f"Last({self.fraction}, start={self.start}, total_steps={self.total_steps}, ramp={self.ramp})"

    def scale(self, step: int) -> float:
        """Return 0 before the start, then 1, or a growing share of it along the ramp; see `Schedule.scale`."""
        if step < self.start:
            return 0.0
        return min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else 1.0


class First:
    """Perturb in the first part of a run, and not after it.

    Args:
        fraction: of the run, in (0, 1].
        total_steps: the optimizer's steps in the whole run, those before a checkpoint included.
        total_epochs: in place of total_steps, with steps_per_epoch: then the part ends with an epoch.
        steps_per_epoch: see total_epochs.

    Raises:
        TypeError: a number is none.
        ValueError: fraction outside (0, 1], no length of the run or two, a length below 1, or a fraction that rounds to
            no step or no epoch at all.
    """

    def __init__(
        self,
        fraction: float,
        total_steps: int | None = None,
        total_epochs: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        check_number("fraction", fraction, lambda share: 0 < share <= 1, "in (0, 1]")
        units, size = _length("First", total_steps, total_epochs, steps_per_epoch)
        self.fraction = fraction
        self.end, self.total_steps = _rounded(fraction * units) * size, units * size
        if self.end == 0:
            raise ValueError(_never("First", fraction, units, size))

    def __repr__(self) -> str:
        return f"First({self.fraction}, end={self.end}, total_steps={self.total_steps})"

    def scale(self, step: int) -> float:
        """Return 1 before the end, then 0; see `Schedule.scale`."""
        return float(step < self.end)


def _length(name: str, total_steps: Any, total_epochs: Any, steps_per_epoch: Any) -> tuple[int, int]:
    """Return the length of a run in units, and the steps in each: in steps of one, or in epochs."""
    by_epochs = total_epochs is not None or steps_per_epoch is not None
    if (total_steps is None) != by_epochs or (total_epochs is None) != (steps_per_epoch is None):
        raise ValueError(
            f"{name} needs the length of the run, total_steps or else total_epochs with steps_per_epoch, got "
            f"total_steps={shown(total_steps)}, total_epochs={shown(total_epochs)} and "
            f"steps_per_epoch={shown(steps_per_epoch)}"
        )
    if by_epochs:
        check_integer("total_epochs", total_epochs, 1, LARGEST_INTEGER)
        check_integer("steps_per_epoch", steps_per_epoch, 1, LARGEST_INTEGER)
        return total_epochs, steps_per_epoch
    check_integer("total_steps", total_steps, 1, LARGEST_INTEGER)
    return total_steps, 1


def _rounded(number: float) -> int:
    return math.floor(number + 0.5)


def _never(name: str, fraction: float, units: int, size: int) -> str:
    unit = "steps" if size == 1 else f"epochs of {size} steps"
    return f"fraction={fraction} of {units} {unit} rounds to none, so that {name} would perturb no step; pass more"


def check_when(when: Any) -> None:
    """Raise TypeError unless something is a schedule or None.

    Args:
        when: what the user gave.
    """
    if when is not None and (isinstance(when, type) or not callable(getattr(when, "scale", None))):
        raise TypeError(
            f"when must be None or a schedule, an object with scale(step), got {shown(when)}; pass for example "
            "fastsam.schedule.Every(5), or Last(0.3, total_steps=1000)"
        )


def scale_of(when: Any, step: int) -> float:
    """Return the scale of a schedule in a step, or 1 without one.

    Args:
        when: the schedule or None.
        step: how many steps came before it.

    Raises:
        TypeError: it is no schedule, or its scale is no number.
        ValueError: the scale is not in [0, 1].
    """
    if when is None:
        return 1.0
    check_when(when)
    scale = when.scale(step)
    check_number(f"scale({step}) of when={shown(when)}", scale, lambda value: 0 <= value <= 1, "in [0, 1]")
    return float(scale)
