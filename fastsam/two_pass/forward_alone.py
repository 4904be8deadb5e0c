"""Forwards that no backward follows."""

import re
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_NEEDS_GRADIENTS = re.compile(r"requires?[ _]grad")
"""In the messages of torch's errors about tensors without a gradient."""


class ForwardAlone:
    """Runs forwards that no backward follows: without gradients, until one of them needs some inside.

    Forces, gradient penalties, adversarial examples and adapted weights are made of gradients, which torch refuses to
    compute under `torch.no_grad()`. Where torch says so the forward is run once more, with gradients, as are all later
    ones. Any other error is the caller's.
    """

    def __init__(self) -> None:
        self._needs_gradients = False

    def __call__(self, forward: Callable[[], T], rewind: Callable[[], None] = lambda: None) -> T:
        """Return `forward()`.

        Args:
            forward: has no arguments.
            rewind: undoes what a forward that failed has moved. Default: nothing.
        """
        if not self._needs_gradients:
            try:
                with torch.no_grad():
                    return forward()
            except RuntimeError as error:
                if not _NEEDS_GRADIENTS.search(str(error)):
                    raise
            rewind()
        with torch.enable_grad():
            result = forward()
        self._needs_gradients = True
        return result
