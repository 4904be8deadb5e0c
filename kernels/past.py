"""Logits of the past that a trajectory loss compares with, and which arguments the loss is defined for."""

from typing import NamedTuple

import torch
from torch import Tensor

LOGITS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of logits; a history may be any of them, or int8."""
REDUCTIONS = ("none", "sum", "mean")
NEVER = torch.iinfo(torch.int32).min
"""The tag of a row while it is written."""


class Past(NamedTuple):
    """Logits that the current ones are compared with: a teacher's, or those of a history of samples.

    Without `ids`, row i of `rows` belongs to row i of the batch. With them it is row `ids[i]`, whose record is valid
    if its tag is exactly `wanted`. A row of the batch takes part in the history if its target is not ignored and its id
    is in range; any other has no past and is not recorded. Of rows with one id the first is recorded, and it alone has
    a past where that replaces what is read. A row without a finite largest logit, such as one that holds NaN, has none.
    """

    rows: Tensor
    """[n, C] logits of a teacher; or [num_samples, width >= C] history, whose columns from C on are padding."""
    scales: Tensor | None = None
    """[num_samples] float32, by which the rows of an int8 history are multiplied."""
    tags: Tensor | None = None
    """[num_samples] int32: the epoch each row was recorded in; before that, a number that is never wanted."""
    ids: Tensor | None = None
    """[n] int64: the sample of each row of the batch."""
    epoch: int = 0
    """The tag of what is recorded now."""
    wanted: int = 0
    """The tag that a valid record has."""
    record: bool = False
    """Whether the batch's logits are recorded."""
    errors: Tensor | None = None
    """[2] int64: how many ids were out of range, and one of them."""
    into: "Past | None" = None
    """Rows, scales and tags of the same sizes to record into; None for those that are read."""

    @property
    def in_place(self) -> bool:
        """Whether the batch's logits replace the rows that are read."""
        return self.record and self.into is None

    @property
    def recorded(self) -> "Past":
        """Where the batch's logits are recorded."""
        return self if self.into is None else self.into


def check_loss(
    logits: Tensor, targets: Tensor | None, past: Past | None, tau: float = 1.0, reduction: str = "none"
) -> None:
    """Raise ValueError unless `trajectory_loss` is defined for these arguments. Reads no element."""
    if logits.dim() != 2 or logits.dtype not in LOGITS or not logits.shape[1]:
        raise ValueError(
            f"logits must be [n, C] of float64, float32, float16 or bfloat16, got {tuple(logits.shape)} {logits.dtype}"
        )
    n, n_classes = logits.shape
    if targets is not None:
        shape = (n, n_classes) if targets.is_floating_point() else (n,)
        if targets.shape != shape or not (targets.is_floating_point() or targets.dtype == torch.int64):
            raise ValueError(
                f"targets must be int64 [{n}] or class probabilities [{n}, {n_classes}], "
                f"got {tuple(targets.shape)} {targets.dtype}"
            )
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; choose one of {', '.join(map(repr, REDUCTIONS))}")
    if past is not None:
        _check_past(past, n, n_classes, logits.device)


def _check_past(past: Past, n: int, n_classes: int, device: torch.device) -> None:
    rows = past.rows
    if past.into is not None:
        _check_past(past.into, n, n_classes, device)
        if (past.into.rows.shape, past.into.rows.stride(), past.into.rows.dtype) != (
            rows.shape,
            rows.stride(),
            rows.dtype,
        ):
            raise ValueError("what is recorded into must be of the shape, strides and dtype of what is read")
    if any(t is not None and t.device != device for t in past if isinstance(t, Tensor)):
        raise ValueError(f"the past must be on the logits' device, {device}")
    if past.ids is None:
        if rows.shape != (n, n_classes) or rows.dtype not in LOGITS:
            raise ValueError(
                f"a teacher's logits must be floating [{n}, {n_classes}], got {tuple(rows.shape)} {rows.dtype}"
            )
        return
    if rows.dim() != 2 or rows.shape[1] < n_classes or not len(rows) or rows.dtype not in (*LOGITS, torch.int8):
        raise ValueError(
            f"a history must be floating or int8 [num_samples, {n_classes} or more], "
            f"got {tuple(rows.shape)} {rows.dtype}"
        )
    if (past.scales is not None) != (rows.dtype == torch.int8):
        raise ValueError(f"scales belong to an int8 history and to no other, got a history of {rows.dtype}")
    wanted = [("ids", past.ids, torch.int64, n), ("tags", past.tags, torch.int32, len(rows))]
    wanted += [("scales", past.scales, torch.float32, len(rows))] if past.scales is not None else []
    wanted += [("errors", past.errors, torch.int64, 2)] if past.errors is not None else []
    for name, tensor, dtype, size in wanted:
        if tensor is None or tensor.dtype != dtype or tensor.shape != (size,) or not tensor.is_contiguous():
            found = None if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} must be a contiguous {dtype} [{size}], got {found}")
