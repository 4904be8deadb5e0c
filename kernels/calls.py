"""Calls that are prepared first and then run as one."""

from collections.abc import Sequence
from functools import partial
from typing import Any

Call = partial[Any]
"""A function of C, with its arguments: of torch, or of Python's own."""


def run_all(calls: Sequence[Call]) -> None:
    """Run calls in order, in a single call of C: Python runs no signal handler before, between or after two of them.

    So whatever interrupts Python finds that all have run or none, as long as they do not run Python themselves.
    """
    list(map(partial.__call__, calls))
