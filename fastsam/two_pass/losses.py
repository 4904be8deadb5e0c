"""Losses of rows with weights, and what they make of a step's objective.

With losses l and weights w >= 0 of a row i's tokens (boxes, classes, ...), and over the rows of one step:

    c_i  = sum of w l in row i          W_i = sum of w in row i          W = sum of W_i
    L    = sum_i c_i / T                T = total, or W

Without weights every row counts 1, and L is the mean of the losses. Where a step has several parts S_j, each perturbed
by itself (mSAM), the gradient is

    d = sum_j grad sum_{S_j} c_i / T                          each row counts what it weighs
    d = (W/T) (1/m) sum_j grad [sum_{S_j} c_i / W_j]          each part counts the same ("uniform")

W is known when the last part's first pass has run. The gradients before it are then brought to one scale with its own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.arguments import shown
from fastsam.two_pass.batch import batch_size
from fastsam.two_pass.gradients import clear, copies, put, scale_, sums, take


class Weighted:
    """What a loss function returns where its terms do not all count the same: tokens, boxes, classes.

    The objective is `(weights * losses).sum() / total`, and each row keeps its own part of it, so that methods which
    choose or cut rows (ESAM, mSAM) do so exactly::

        def losses(ids, mask, labels):
            logits = model(ids, mask).logits[:, :-1]
            per_token = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            return fastsam.Weighted(per_token, labels[:, 1:] != -100)

    is a language model's mean over all tokens, not the mean of its sequences' means.

    Args:
        losses: of each row, shape [n], or of each row's terms, shape [n, ...]; with a gradient. Losses of 16 bits are
            summed in float32.
        weights: of the same shape, >= 0, without a gradient; numbers or a mask.
        total: what the weighted sum is divided by: a positive number or 0-dim tensor. Default: the sum of the weights
            of all rows of the call. With accumulation it is the sum over all micro-batches, and no mean over them is
            taken; under DistributedDataParallel, which takes the mean over ranks, the sum over ranks divided by their
            number. Only the loop knows both.

    Raises:
        TypeError: losses or weights is no tensor, or total no number.
        ValueError: shapes differ, weights require a gradient, or total is not positive.
    """

    __slots__ = ("losses", "total", "weights")

    def __init__(self, losses: Tensor, weights: Tensor, total: float | Tensor | None = None) -> None:
        for name, value in (("losses", losses), ("weights", weights)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} of Weighted must be a tensor, got {shown(value)}")
        if losses.shape != weights.shape or not losses.dim():
            raise ValueError(
                f"losses and weights of Weighted must both be of shape [n] or [n, ...], got {list(losses.shape)} and "
                f"{list(weights.shape)}"
            )
        if weights.requires_grad:
            raise ValueError("weights of Weighted require a gradient; pass weights.detach()")
        _check_total(total)
        self.losses, self.weights, self.total = losses, weights, total


def _check_total(total: Any) -> None:
    if total is None or (isinstance(total, Tensor) and total.dim() == 0):
        return
    if isinstance(total, bool) or not isinstance(total, (int, float)):
        raise TypeError(f"total of Weighted must be a number or a 0-dim tensor, got {shown(total)}")
    if not total > 0 or not math.isfinite(total):
        raise ValueError(f"total of Weighted must be positive, got {shown(total)}")


class Losses:
    """Losses of the rows of one call, as `check_losses` returns them.

    Args:
        rows: c_i, shape [n]; or one loss of all rows, 0-dim.
        weights: W_i, shape [n]; None where each row counts 1.
        total: T; None for the sum of the weights.

    Where they are a part of a batch's rows, `of_all` holds those of all rows at the same weights.
    """

    of_all: "Losses | None" = None

    def __init__(self, rows: Tensor, weights: Tensor | None = None, total: float | Tensor | None = None) -> None:
        self.rows, self.weights, self.total = rows, weights, total

    @classmethod
    def of(cls, weighted: Weighted) -> "Losses":
        """Return the rows' parts of a weighted loss.

        Raises:
            ValueError: a weight on the CPU is negative; elsewhere nobody looks, since that would wait for the device.
        """
        if weighted.weights.device.type == "cpu" and bool((weighted.weights < 0).any()):
            raise ValueError(f"weights of fastsam.Weighted must be >= 0, got {weighted.weights.min().item()}")
        losses = weighted.losses.float() if weighted.losses.dtype.itemsize < 4 else weighted.losses
        weights = weighted.weights.to(losses.dtype)
        rows, sums = weights * losses, weights
        if losses.dim() > 1:
            rows, sums = rows.flatten(1).sum(1), weights.flatten(1).sum(1)
        return cls(rows, sums, weighted.total)

    def __len__(self) -> int:
        return len(self.rows)

    def detach(self) -> "Losses":
        """Return them without a gradient."""
        return Losses(self.rows.detach(), self.weights, self.total)

    def take(self, rows: Tensor) -> "Losses":
        """Return those of these rows, int64 indices of shape [k]."""
        weights = None if self.weights is None else self.weights.index_select(0, rows)
        return Losses(self.rows.index_select(0, rows), weights, self.total)

    def mean(self) -> Tensor:
        """Return `sum c_i / sum W_i` over these rows, 0-dim; 0 where nothing weighs anything."""
        if self.weights is None:
            return self.rows.mean()
        return self.rows.sum() / _at_least_something(self.weights.sum())

    def part_of_total(self) -> Tensor | float:
        """Return W / T, 1 where the total is these rows' own."""
        if self.weights is None or self.total is None:
            return 1.0
        return self.weights.sum() / self.total

    def objective(self) -> Tensor:
        """Return `sum c_i / T` over these rows, 0-dim."""
        if self.weights is None or self.total is None:
            return self.mean()
        return self.rows.sum() / self.total

    def ranked(self) -> Tensor:
        """Return c_i, -inf for rows that weigh nothing, so that they come last where the largest are chosen."""
        return self.rows if self.weights is None else self.rows.masked_fill(self.weights == 0, -math.inf)


class Pair(NamedTuple):
    """A part of the batch that is perturbed by itself: a first pass and a second one."""

    batch: tuple[Any, ...]
    """Arguments of the loss function."""
    weight: float = 1.0
    """What the mean loss of the part counts in the step's gradient, where its rows weigh 1."""
    share: float = 1.0
    """What its batch-norm statistics count, the part's share of the rows."""
    counts_alike: bool = False
    """Whether it counts `weight` whatever its rows weigh, as every part of mSAM's Eq. 7 counts 1/m."""


class StepObjective:
    """Makes the losses that the passes of a step go back from.

    Args:
        pairs: the parts of the batch, which are perturbed one after the other.
        params: whose gradients the passes leave.
        may_rescale: whether gradients of earlier parts are this rank's own, so that they may be brought to a scale that
            is known later.
    """

    def __init__(self, pairs: Sequence[Pair], params: Sequence[Tensor], may_rescale: bool) -> None:
        self._pairs, self._params, self._may_rescale = pairs, params, may_rescale
        self._weights: list[Tensor] = []
        self._before: list[Tensor | None] = []

    def of_first(self, first: Losses) -> Tensor:
        """Return the loss of a part's first pass."""
        return first.objective()

    def of_second(self, i: int, first: Losses, second: Losses) -> Tensor:
        """Return the loss of part i's second pass, and bring what earlier parts have left in p.grad to its scale.

        Args:
            i: which part.
            first: the losses of its first pass, or of its only one.
            second: the losses that the second pass goes back from.

        Raises:
            ValueError: T would be known too late.
        """
        if (first.weights is None) != (second.weights is None) or (
            i and bool(self._weights) == (first.weights is None)
        ):
            raise TypeError(
                "the loss function returned fastsam.Weighted in some calls and not in others; return one kind"
            )
        pair = self._pairs[i]
        if first.weights is None:
            return second.mean() if pair.weight == 1 else second.mean() * pair.weight
        weight = first.weights.sum()
        self._weights.append(weight)
        if len(self._pairs) == 1:
            return second.mean() if first.total is None else second.mean() * first.part_of_total()
        # Relative to n, until W is known.
        n = sum(batch_size(p.batch) for p in self._pairs)
        share = pair.weight if pair.counts_alike else weight / (n if first.total is None else first.total)
        if pair.counts_alike == (first.total is None):
            return second.mean() * share
        return second.mean() * (share * self._late_factor(i, n, first.total))

    def _late_factor(self, i: int, n: int, total: float | Tensor | None) -> Tensor | float:
        """Return what the last part's loss and the gradients of all parts before it still have to be multiplied by."""
        if not self._may_rescale:
            raise ValueError(
                "fastsam.Weighted in several parts of a batch needs total= here, where the gradients of each part are "
                "reduced between ranks as soon as they are there: pass the sum of the weights of the whole step"
            )
        if i == 0:
            self._before = copies(self._params)
            clear(self._params)
        if i < len(self._pairs) - 1:
            return 1.0
        weight = torch.stack(self._weights).sum()
        factor = n / _at_least_something(weight) if total is None else weight / total
        scale_(self._params, factor)
        put(self._params, sums(self._before, take(self._params)))
        return factor


def joined(losses: Sequence[Losses]) -> Tensor:
    """Return the objective over the rows of all parts of a step, 0-dim."""
    if len(losses) == 1:
        return losses[0].objective()
    rows, total = torch.cat([part.rows for part in losses]), losses[0].total
    weights = [part.weights for part in losses if part.weights is not None]
    return Losses(rows, torch.cat(weights) if weights else None, total).objective()


def _at_least_something(total: Tensor) -> Tensor:
    """Return what to divide by: where the sum of the weights is 0, what is divided is too."""
    return torch.where(total == 0, torch.ones_like(total), total)
