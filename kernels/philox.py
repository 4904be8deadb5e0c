"""Philox 4x32-10 random words, addressed by position instead of drawn in sequence.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    key     = (seed mod 2^32, seed div 2^32)
    counter = (element div 4 mod 2^32, tensor index, step, element div 4 div 2^32)
    word    = the (element mod 4)-th of the four words that ten rounds give

A word depends on its position alone, so draws do not change with block size, backend or sharding.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_STEPS_AT_ONCE = 64


class Draw(NamedTuple):
    """Which random numbers a launch uses, and what for.

    `seed`, `step` and one tensor index for every tensor of its list address them. `rounding` rounds 16-bit weights
    stochastically. `keep_probability`, for every tensor that of keeping an element, masks the others out; with `whole`
    the word of a tensor's first element decides on all of it. `starts` says which element of the whole each tensor's
    first one is, where tensors are parts; None means 0 for all. `advance`, a 0-dim int64 tensor on the device, is added
    to the step where the launch runs, so that replays of one launch draw other numbers.
    """

    seed: int
    step: int
    indices: tuple[int, ...]
    rounding: bool = True
    keep_probability: tuple[float, ...] | None = None
    starts: tuple[int, ...] | None = None
    whole: bool = False
    advance: Tensor | None = None

    def take(self, positions: Sequence[int]) -> "Draw":
        """Return the draw for the tensors at these positions of the list alone."""
        keep_probability = None if self.keep_probability is None else tuple(self.keep_probability[i] for i in positions)
        indices, starts = (tuple(column[i] for i in positions) for column in self.addresses())
        return self._replace(indices=indices, keep_probability=keep_probability, starts=starts)

    def addresses(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return every tensor's index and its first element."""
        return self.indices, self.starts or (0,) * len(self.indices)


def _multiply(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of multiplier * x, in halves that int64 can hold."""
    high = (multiplier * (x >> 16) + ((multiplier * (x & 0xFFFF)) >> 16)) >> 16
    return high, (multiplier * x) & _MASK


def words(
    n_elements: int, tensor_index: int, step: int, seed: int, *, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the random words of elements `start` to `start` + `n_elements` - 1 of one tensor.

    Args:
        n_elements: how many words to draw.
        tensor_index: position of the tensor in group order.
        step: number of the step, taken modulo 2^32.
        seed: any integer, taken modulo 2^64.
        start: the first element, >= 0.
        device: where the words are computed.

    Returns:
        int64 tensor of shape [n_elements] with values in [0, 2^32).
    """
    quads = torch.arange(start // 4, (start + n_elements + 3) // 4, device=device)
    index = torch.full_like(quads, tensor_index & _MASK)
    rounds = _rounds(quads, index, torch.full_like(quads, step & _MASK), seed)
    return torch.stack(rounds, dim=1).reshape(-1)[start % 4 :][:n_elements]


def first_words(n_tensors: int, step: int, seed: int) -> list[int]:
    """Return the random word of element 0 of each of the tensors 0 to `n_tensors` - 1."""
    return _first_words(n_tensors, step // _STEPS_AT_ONCE, seed)[step % _STEPS_AT_ONCE]


@lru_cache(16)
def _first_words(n_tensors: int, block: int, seed: int) -> list[list[int]]:
    """The same for a block of steps: ten rounds are some 200 small operations, however many numbers each is of."""
    steps = torch.arange(block * _STEPS_AT_ONCE, (block + 1) * _STEPS_AT_ONCE).repeat_interleave(n_tensors)
    indices = torch.arange(n_tensors).repeat(_STEPS_AT_ONCE)
    return _rounds(torch.zeros_like(indices), indices, steps, seed)[0].view(_STEPS_AT_ONCE, n_tensors).tolist()


def threshold(keep_probability: float) -> int:
    """Return the number below which a word keeps its element, with this probability; for 1 all words do."""
    return math.floor(keep_probability * 2**32) if keep_probability < 1 else 2**32


def _rounds(quads: Tensor, indices: Tensor, steps: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c0, c1, c2, c3 = quads & _MASK, indices, steps & _MASK, quads >> 32
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3
