"""A user's loss function as the engine calls it, and what it may return."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastsam.two_pass.batch import Batch
from fastsam.two_pass.losses import Losses, Weighted

OTHER_WAYS = "A loss of the whole batch goes with opt.step(closure), or opt.ascent() and opt.descent()"


class LossFunction:
    """A loss function with its batch: guarded against changes of the batch, and without what else it returns.

    Args:
        loss_fn: the user's.
        batch: its arguments, as they were read.
        has_aux: it returns its losses and something else, which is kept from the first call of each pair.
    """

    def __init__(self, loss_fn: Callable[..., Any], batch: Batch, has_aux: bool = False) -> None:
        self._call, self.has_aux = batch.guarded(loss_fn), has_aux
        self._kept: list[Any] = []
        self._begins_pair = False
        self._kinds: set[tuple[bool, bool]] = set()

    def begin_pair(self) -> None:
        """Keep what the next call returns beside its losses."""
        self._begins_pair = True

    def __call__(self, *batch: Any) -> Any:
        """Return the losses of a batch, or a part of it, as the user's function does."""
        returned = self._call(*batch)
        losses = self._without_aux(returned) if self.has_aux else returned
        self._kinds.add((isinstance(losses, Weighted), getattr(losses, "total", None) is None))
        if len(self._kinds) > 1:
            raise TypeError(
                "the loss function returned fastsam.Weighted, or its total, in some calls of the step alone; return it "
                "in all or in none"
            )
        return losses

    def _without_aux(self, returned: Any) -> Any:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                f"with has_aux=True the loss function must return two values, (losses, aux), got {_kind(returned)}"
            )
        if self._begins_pair:
            self._kept.append(returned[1])
            self._begins_pair = False
        return returned[0]

    def with_aux(self, loss: Tensor) -> Any:
        """Return the loss, and with has_aux=True the aux of the first pass; of several pairs a list of theirs."""
        if not self.has_aux:
            return loss
        return loss, self._kept[0] if len(self._kept) == 1 else self._kept


def check_losses(losses: Any, n: int | None, needs_grad: bool = True, may_be_scalar: bool = False) -> Losses:
    """Return the rows' losses if `losses` is what a loss function may return, else raise what is wrong with it.

    Args:
        losses: what the loss function returned.
        n: rows of its batch; None where one loss of the whole batch is expected.
        needs_grad: whether a backward follows.
        may_be_scalar: whether one loss of the whole batch, 0-dim, will do.

    Raises:
        TypeError: `losses` is something else than n losses.
        RuntimeError: `losses` has no gradient, but `needs_grad`.
    """
    if isinstance(losses, Weighted) and n is not None:
        return _check_weighted(losses, n, needs_grad)
    shapes = [*([()] if n is None or may_be_scalar else []), *([] if n is None else [(n,)])]
    if isinstance(losses, Tensor) and tuple(losses.shape) in shapes:
        _check_gradient(losses, needs_grad)
        return Losses(losses)
    if n is None:
        raise TypeError(f"the loss function returned {_kind(losses)}; without a batch it must return one 0-dim loss")
    remedy = f"it must return per-sample losses of shape [{n}] without calling backward, e.g. with reduction='none'"
    remedy = f"{remedy}, or their mean" if may_be_scalar else f"{remedy}. {OTHER_WAYS}"
    if isinstance(losses, Tensor) and losses.shape == (n, 1):
        raise TypeError(
            f"the loss function returned a tensor of shape [{n}, 1]; return losses.squeeze(1), for {remedy}"
        )
    raise TypeError(f"the loss function returned {_kind(losses)}; {remedy}")


def _check_weighted(weighted: Weighted, n: int, needs_grad: bool) -> Losses:
    if len(weighted.losses) != n:
        raise TypeError(
            f"the loss function returned fastsam.Weighted of {len(weighted.losses)} rows for a batch of {n}; its "
            f"losses and weights must be of shape [{n}] or [{n}, ...], one row for each of the batch's"
        )
    _check_gradient(weighted.losses, needs_grad)
    return Losses.of(weighted)


def _check_gradient(losses: Tensor, needs_grad: bool) -> None:
    if needs_grad and not losses.requires_grad:
        raise RuntimeError("the losses have no gradient; compute them from the model outside torch.no_grad()")


def _kind(returned: Any) -> str:
    if isinstance(returned, tuple):
        return f"{len(returned)} values (has_aux=True is for (losses, aux))"
    if not isinstance(returned, Tensor):
        return type(returned).__name__
    return "a scalar" if returned.dim() == 0 else f"a tensor of shape {list(returned.shape)}"
