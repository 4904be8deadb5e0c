"""Reference implementation of the loss of trajectory methods: cross-entropy with a KL divergence from the past.

    q = softmax(logits / tau), p = softmax(past / tau)
    loss of a row = cross-entropy(logits, target) + weight KL(p || q)
    its gradient  = (softmax(logits) - target) + weight / tau (q - p)

SAF's Eq. 9 and MESA's Eq. 13 with weight = lam tau^2. A past is the teacher's logits, or what a history recorded of the
samples.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam.kernels.past import NEVER, Past
from fastsam.kernels.reference_common import arithmetic_dtype, reads_scalars

LARGEST_HALF = 65504.0
"""Finite logits are clamped to this magnitude where a history is float16."""
SMALLEST_SCALE = 2.0**-126
"""Of an int8 history's rows: what keeps a division by it finite."""


class _Rows(NamedTuple):
    """Which rows of the history the batch may read and write."""

    ids: Tensor | None
    """In range; None for a teacher."""
    read: Tensor | None
    """[n] bool, rows with a row of the history; None where all have one."""
    recorded: Tensor | None
    """[n] bool, the first of them for each id; None where all are."""


def trajectory_loss(
    logits: Tensor,
    targets: Tensor,
    past: Past | None,
    *,
    tau: float,
    weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the gradient of each row and its scale; see `ops.trajectory_loss`."""
    ignored = _ignored(targets, ignore_index)
    shifted, probabilities = _exponentials(logits.to(arithmetic_dtype(logits.dtype)))
    sums = probabilities.sum(1, keepdim=True)
    gradient = probabilities.div_(sums)
    if targets.is_floating_point():
        losses = _toward_probabilities(shifted, sums, gradient, targets, label_smoothing)
    else:
        losses = _toward_classes(shifted, sums, gradient, targets, ignored, ignore_index, label_smoothing)
    if past is not None and len(logits):
        rows = _find_rows(past, ignored)
        _pull(shifted, losses, gradient, past, rows, tau, weight)
        if past.record:
            _write(logits, past.recorded, rows)
    if ignored is not None:
        losses.masked_fill_(ignored, 0)
        gradient.masked_fill_(ignored.unsqueeze(1), 0)
    loss, scale = _reduce(losses, ignored, reduction)
    return loss, gradient.to(logits.dtype), scale


def record_(logits: Tensor, past: Past, targets: Tensor | None, ignore_index: int) -> None:
    """Record the logits in the history; see `ops.record_`."""
    if len(logits):
        _write(logits, past, _find_rows(past, _ignored(targets, ignore_index)))


def _ignored(targets: Tensor | None, ignore_index: int) -> Tensor | None:
    """Rows with an ignored target; None where there is none."""
    if targets is None or targets.is_floating_point():
        return None
    ignored = targets == ignore_index
    return None if reads_scalars(ignored.device) and not ignored.any() else ignored


def _exponentials(x: Tensor, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return x relative to the largest of its row, and exp(that / tau)."""
    shifted = x - x.amax(1, keepdim=True)
    return shifted, (shifted.exp() if tau == 1 else shifted.div(tau).exp_())


def _toward_classes(
    shifted: Tensor,
    sums: Tensor,
    gradient: Tensor,
    targets: Tensor,
    ignored: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """Return the cross-entropy of each row, and turn `gradient` from the probabilities into its gradient."""
    losses = F.nll_loss(shifted, targets, reduction="none", ignore_index=ignore_index)
    index = targets if ignored is None else targets.masked_fill(ignored, 0)
    gradient.scatter_(1, index.unsqueeze(1), smoothing - 1, reduce="add")
    if smoothing:
        share = smoothing / shifted.shape[1]
        losses.mul_(1 - smoothing).sub_(shifted.sum(1), alpha=share)
        gradient.sub_(share)
    return losses.add_(sums.log().squeeze(1))


def _toward_probabilities(shifted: Tensor, sums: Tensor, gradient: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The same for class probabilities, which need not add up to 1."""
    t = targets.to(shifted.dtype)
    if smoothing:
        t = t.mul(1 - smoothing).add_(smoothing / shifted.shape[1])
    total = t.sum(1, keepdim=True)
    gradient.mul_(total).sub_(t)
    return sums.log().mul_(total).squeeze(1).sub_(torch.where(t == 0, 0, shifted).mul_(t).sum(1))


def _find_rows(past: Past, ignored: Tensor | None) -> _Rows:
    """Find who takes part, and count the ids that are out of range."""
    ids, n_samples = past.ids, len(past.rows)
    if ids is None:
        return _Rows(None, None, None)
    if ignored is None and reads_scalars(ids.device) and _are_distinct(ids, n_samples):
        return _Rows(ids, None, None)
    inside = (ids >= 0) & (ids < n_samples)
    counted = torch.ones_like(inside) if ignored is None else ~ignored
    if past.errors is not None:
        outside = counted & ~inside
        past.errors[0] += outside.sum()
        one = ids.index_select(0, outside.int().argmax(0, keepdim=True))
        past.errors[1:] = torch.where(outside.any(), one, past.errors[1:])
    # A row that cannot take part is given a number that no other has.
    numbers = torch.where(counted & inside, ids, -1 - torch.arange(len(ids), device=ids.device))
    ordered, order = numbers.sort(stable=True)
    again = torch.zeros_like(inside).scatter_(0, order[1:], ordered[1:] == ordered[:-1])
    recorded = counted & inside & ~again
    return _Rows(ids.clamp(0, n_samples - 1), recorded if past.in_place else counted & inside, recorded)


def _are_distinct(ids: Tensor, n_samples: int) -> bool:
    """Whether all ids are in range and no two the same; reads them on the host."""
    ordered = ids.sort().values
    in_range = bool(ordered[0] >= 0) and bool(ordered[-1] < n_samples)
    return in_range and not (ordered[1:] == ordered[:-1]).any()


def _pull(
    shifted: Tensor, losses: Tensor, gradient: Tensor, past: Past, rows: _Rows, tau: float, weight: float
) -> None:
    """Add weight KL(past || current) to the losses of rows that have a past, and its gradient to theirs."""
    may_look = reads_scalars(losses.device)
    valid = rows.read
    if past.tags is not None and rows.ids is not None:
        fresh = past.tags.index_select(0, rows.ids) == past.wanted
        valid = fresh if valid is None else valid & fresh
        if may_look and not valid.any():
            return
    past_shifted, p = _exponentials(_read(past, rows.ids, shifted.shape[1], losses.dtype), tau)
    q = shifted.div(tau).exp_()
    p_sums, q_sums = p.sum(1), q.sum(1)
    # Not so for a past with a NaN or an inf, or without a finite logit.
    sound = p_sums > 0
    valid = sound if valid is None else valid & sound
    # A NaN is 0 inf here, of a class whose past probability is 0; a NaN logit is in the cross-entropy as well.
    spread = past_shifted.sub_(shifted).mul_(p).nansum(1)
    divergences = spread.div_(p_sums * tau).sub_(p_sums.div(q_sums).log_())
    pull = q.div_(q_sums.unsqueeze(1)).sub_(p.div_(p_sums.unsqueeze(1)))
    if not (may_look and valid.all()):
        divergences.masked_fill_(~valid, 0)
        pull.masked_fill_(~valid.unsqueeze(1), 0)
    losses.add_(divergences, alpha=weight)
    gradient.add_(pull, alpha=weight / tau)


def _read(past: Past, ids: Tensor | None, n_classes: int, dtype: torch.dtype) -> Tensor:
    """The past logits of each row."""
    if ids is None:
        return past.rows.to(dtype)
    found = past.rows[:, :n_classes].index_select(0, ids).to(dtype)
    return found if past.scales is None else found.mul_(past.scales.index_select(0, ids).unsqueeze(1))


def _write(logits: Tensor, past: Past, rows: _Rows) -> None:
    """Record the logits of the rows that take part; until a row is whole, its tag is NEVER."""
    assert rows.ids is not None
    assert past.tags is not None
    ids, taking_part = rows.ids, rows.recorded
    values, scales = _encode(logits, past.rows.dtype)
    tags = [(past.tags, torch.full_like(ids, tag, dtype=torch.int32)) for tag in (NEVER, past.epoch)]
    tables = [tags[0], (past.rows[:, : logits.shape[1]], values), tags[1]]
    if past.scales is not None and scales is not None:
        tables.insert(1, (past.scales, scales))
    if taking_part is None:
        for table, new in tables:
            table.index_copy_(0, ids, new)
        return
    # Shapes may not depend on the data: a row that takes no part repeats the first that does, if there is one.
    numbers = torch.arange(len(ids), device=ids.device)
    source = torch.where(taking_part, numbers, taking_part.int().argmax())
    ids = ids.index_select(0, source)
    for table, new in tables:
        old = table.index_select(0, ids)
        table.index_copy_(0, ids, torch.where(taking_part.any(), new.index_select(0, source), old))


def _encode(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The logits as a history of this dtype holds them, and the scales of int8."""
    if dtype == torch.int8:
        z = logits.float()
        scales = z.abs().amax(1).mul_(1 / 127).clamp_(min=SMALLEST_SCALE)
        # A scale of inf says that there was a NaN or an inf.
        scales = scales.nan_to_num_(torch.inf, torch.inf)
        return z.div(scales.unsqueeze(1)).round_().nan_to_num_(0.0).to(dtype), scales
    if dtype == torch.float16 and logits.dtype != dtype and not _fits_half(logits):
        logits = torch.where(logits.isinf(), logits, logits.clamp(-LARGEST_HALF, LARGEST_HALF))
    return logits.to(dtype), None


def _fits_half(logits: Tensor) -> bool:
    """Whether all logits are known to be in float16's range."""
    if not reads_scalars(logits.device):
        return False
    lowest, highest = logits.aminmax()
    return bool(lowest >= -LARGEST_HALF) and bool(highest <= LARGEST_HALF)


def _reduce(losses: Tensor, ignored: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Return the reduced loss and its gradient's scale."""
    if reduction == "none":
        return losses, losses.new_ones(())
    if reduction == "sum":
        return losses.sum(), losses.new_ones(())
    if ignored is None:
        return losses.mean(), losses.new_full((), 1 / max(len(losses), 1))
    count = (~ignored).sum().to(losses.dtype)
    return losses.sum() / count, torch.where(count > 0, 1 / count, 0)
