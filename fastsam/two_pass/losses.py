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
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.arguments import shown
from fastsam.two_pass import capture
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
            number. Only the loop knows both. It is that of the whole step, not of one call: computed within the loss
            function it would be a shard's. `graph_step` follows a 0-dim tensor among the batch's arguments; a number
            there is captured anew when it changes, and one that a closure holds is baked into the graph.

    Raises:
        TypeError: losses or weights is no tensor, or total neither a number nor a 0-dim tensor.
        ValueError: shapes differ, weights or total require a gradient, or total is not positive, as far as
            the host may look.
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
    if total is None:
        return
    is_tensor = isinstance(total, Tensor) and total.dim() == 0 and total.dtype is not torch.bool
    if isinstance(total, bool) or not (is_tensor or isinstance(total, numbers.Real)):
        raise TypeError(f"total of Weighted must be a number or a 0-dim tensor, got {shown(total)}")
    if is_tensor and total.requires_grad:
        raise ValueError("total of Weighted requires a gradient; pass total.detach()")
    if (not is_tensor or _is_readable(total)) and not 0 < total < math.inf:
        raise ValueError(f"total of Weighted must be positive, got {shown(total)}")


def _is_readable(tensor: Tensor) -> bool:
    """Whether a tensor's values may be read on the host: on the CPU, but for steps that are captured."""
    return tensor.device.type == "cpu" and capture.recorder() is None


class Losses:
    """Losses of the rows of one call, as `check_losses` returns them.

    Args:
        rows: c_i, shape [n]; or one loss of all rows, 0-dim.
        weights: W_i, shape [n]; None where each row counts 1.
        total: T; None for the sum of the weights.

    Where they are a part of a batch's rows, `of_all` holds those of all rows at the same weights.
    """

    of_all: "Losses | None" = None
    selection: tuple[Tensor, Tensor] | None = None
    """Of those of all rows: which rows were chosen of them, and their losses in the first pass."""

    def __init__(self, rows: Tensor, weights: Tensor | None = None, total: float | Tensor | None = None) -> None:
        self.rows, self.weights, self.total = rows, weights, total

    @classmethod
    def of(cls, weighted: Weighted) -> "Losses":
        """Return the rows' parts of a weighted loss.

        Raises:
            ValueError: a weight on the CPU is negative; elsewhere nobody looks, since that would wait for the device.
        """
        if _is_readable(weighted.weights) and bool((weighted.weights < 0).any()):
            raise ValueError(f"weights of fastsam.Weighted must be >= 0, got {weighted.weights.min().item()}")
        losses = weighted.losses.float() if weighted.losses.dtype.itemsize < 4 else weighted.losses
        weights = weighted.weights.to(losses.dtype, copy=True)
        # what weighs nothing may be inf or NaN
        rows, sums = weights * losses.masked_fill(weights == 0, 0), weights
        if losses.dim() > 1:
            rows, sums = rows.flatten(1).sum(1), weights.flatten(1).sum(1)
        return cls(rows, sums, weighted.total)

    def __len__(self) -> int:
        return len(self.rows)

    def detach(self) -> "Losses":
        """Return them without a gradient."""
        found = Losses(self.rows.detach(), self.weights, self.total)
        found.selection = self.selection
        return found

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
        if len(self._pairs) == 1:
            # of a part of the rows, the mean by their weights stands for all
            return second.mean() * first.part_of_total() if second.of_all is not None else second.objective()
        self._weights.append(first.weights.sum())
        if pair.counts_alike:
            loss, total = second.mean() * pair.weight, first.total
            return loss if total is None else loss * self._late_factor(i, lambda weight: weight / total)
        if first.total is not None:
            return second.objective()
        # Relative to what the first part's rows weigh, as if all did, until W is known.
        n = sum(batch_size(p.batch) for p in self._pairs)
        presumed = n * _at_least_something(self._weights[0]) / batch_size(self._pairs[0].batch)
        loss = second.rows.sum() / presumed
        return loss * self._late_factor(i, lambda weight: presumed / _at_least_something(weight))

    def _late_factor(self, i: int, factor_of: Callable[[Tensor], Tensor]) -> Tensor | float:
        """Return what the last part's loss still has to be multiplied by, and multiply the gradients before it by it.

        Args:
            i: which part.
            factor_of: returns it, given W.
        """
        if not self._may_rescale:
            raise ValueError(
                "several parts of a batch with fastsam.Weighted cannot wait here for the sum of the weights, since the "
                "gradients of each part are reduced between ranks, or combined, as soon as they are there: with "
                "weighting='sample' pass total=, the sum of the weights of the whole step; with weighting='uniform' "
                "leave total= out"
            )
        if i == 0:
            self._before = copies(self._params)
            clear(self._params)
        if i < len(self._pairs) - 1:
            return 1.0
        factor = factor_of(torch.stack(self._weights).sum())
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
