"""Launches inside a capture, which later replays repeat with the addresses and the numbers that they had.

Whoever captures keeps the tensors alive, so addresses hold. A number that may change, such as a learning rate, lies in
a table on the device: the host fills it anew before a replay. Nothing is uploaded during a capture, where a copy would
be repeated too, from memory that is long gone; tables made there are filled when it is over.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Lines = tuple[tuple[float, ...], ...]
"""Sets of hyperparameters, one for each parameter."""


class Refreshable(list):
    """A list of numbers or options, and the function that returns it as it is now."""

    def __init__(self, items: Iterable[Any], refresh: Callable[[], Sequence[Any]]) -> None:
        super().__init__(items)
        self.refresh = refresh


class Tables:
    """The tables of one capture, and other scratch that its launches need for as long as it is replayed."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []
        self._empty: list[tuple[Tensor, Tensor]] = []
        self._live: list[tuple[Tensor, Callable[[], Lines]]] = []
        self._lines: list[Lines] = []

    def upload(self, host: Tensor, device: torch.device) -> Tensor:
        """Return a tensor on `device` that will hold these numbers when the capture is over."""
        table = torch.empty_like(host, device=device)
        self._empty.append((table, host))
        return table

    def live(self, lines: Callable[[], Lines], device: torch.device) -> Tensor:
        """Return a float64 table on `device` that `refresh` keeps at what `lines()` returns."""
        now = lines()
        table = self.upload(torch.tensor(now, dtype=torch.float64), device)
        self._live.append((table, lines))
        self._lines.append(now)
        return table

    def fill(self) -> None:
        """Upload what was asked for during the capture."""
        for table, host in self._empty:
            _copy(host, table)
        self._empty = []

    def refresh(self) -> None:
        """Upload the tables whose lines are others now."""
        for i, (table, lines) in enumerate(self._live):
            now = lines()
            if now != self._lines[i]:
                _copy(torch.tensor(now, dtype=torch.float64), table)
                self._lines[i] = now


def _copy(host: Tensor, table: Tensor) -> None:
    table.copy_(host.pin_memory() if table.is_cuda else host, non_blocking=True)


_open: Tables | None = None


@contextmanager
def capturing(tables: Tables) -> Iterator[None]:
    """Context in which launches take their tables from `tables`."""
    global _open
    _open = tables
    try:
        yield
    finally:
        _open = None


def hold(*tensors: Tensor) -> None:
    """Let a capture hold tensors that its launches were given, and that others may drop."""
    if _open is not None:
        _open.held += tensors


def tables() -> Tables | None:
    """Return the tables of the capture that is under way, if any."""
    return _open


def refresh_of(items: Sequence[Any], lines_of: Callable[[Sequence[Any]], Iterable[tuple[float, ...]]]) -> Any:
    """Return a function that makes lines of what `items` are by then; None outside of a capture."""
    if _open is None:
        return None
    refresh = items.refresh if isinstance(items, Refreshable) else lambda: items
    return lambda: tuple(lines_of(refresh()))


def refuse_reference(rest: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a capture would leave tensors to the reference, whose numbers nobody could refresh."""
    if _open is None:
        return
    if left := [tensors[i] for i in rest if tensors[i].numel()]:
        raise RuntimeError(
            f"a parameter of shape {tuple(left[0].shape)}, {left[0].dtype}, strides {left[0].stride()}, cannot be "
            "walked by the kernels (amsgrad, a dtype they do not know, gaps in memory, or a gradient laid out in "
            "another way), and what walks it instead cannot be captured"
        )
