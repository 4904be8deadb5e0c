"""What sits in p.grad: fresh gradients, gradients that a step has consumed, and gradients set aside."""

import weakref
from collections.abc import Sequence
from functools import partial
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed.dtensor import is_dtensor, local


def flat(groups: Sequence[dict]) -> list[Tensor]:
    """All parameters in group order."""
    return [p for group in groups for p in group["params"]]


def take(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The parameters' gradients as they are."""
    return [p.grad for p in params]


def put(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Make `grads` the parameters' gradients."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def copies(params: Sequence[Tensor]) -> list[Tensor | None]:
    """Copies of the parameters' gradients."""
    return [None if p.grad is None else p.grad.clone() for p in params]


def are_odd(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
    """Whether a parameter is complex or a gradient sparse."""
    return any(map(Tensor.is_complex, params)) or any(map(_is_sparse, filter(_is_there, grads)))


_is_sparse, _is_there = attrgetter("is_sparse"), partial(is_not, None)


@torch.no_grad()
def sums(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums of two lists of gradients, added into the first one's; None where neither has one."""
    pairs = zip(some, others, strict=True)
    return [b if a is None else a if b is None else a.add_(b) for a, b in pairs]


@torch.no_grad()
def scale_(params: Sequence[Tensor], factor: Tensor | float) -> None:
    """Multiply the parameters' gradients by a number in place."""
    for p in params:
        if p.grad is None:
            continue
        factor = factor.to(p.grad.device) if isinstance(factor, Tensor) else factor
        if p.grad.dtype.itemsize < 4:
            # A factor rounded to 16 bits would be off by 0.4 %.
            p.grad.copy_(p.grad.float() * factor)
        else:
            p.grad.mul_(factor)


def clear(params: Sequence[Tensor]) -> None:
    """Drop the parameters' gradients."""
    for p in params:
        p.grad = None


class ConsumedMark:
    """Remembers the gradients that the last step consumed, so that leftovers are not mistaken for new ones.

    A gradient is consumed while it is the same tensor at the same version. One tensor per group is watched: a backward
    writes all of them or none. FSDP2 adds to a DTensor's own entries behind its back, so their version is what counts.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref, int]] = {}
        self.zeroed = False

    def set(self, groups: Sequence[dict], zeroed: bool = False) -> None:
        """Declare whatever is in p.grad now consumed, and whether it is zeros, ready to be added to."""
        self._seen, self.zeroed = {}, zeroed
        for group in groups:
            for p, grad in _first_with_grad(group):
                self._seen[id(p)] = weakref.ref(grad), local(grad)._version

    def covers(self, groups: Sequence[dict], also_missing: bool = False) -> bool:
        """Whether nothing in p.grad is newer than the last call of `set`.

        Args:
            groups: the optimizer's.
            also_missing: and nothing is gone since.
        """
        if also_missing and len(self._seen) != sum(bool(_first_with_grad(group)) for group in groups):
            return False
        for group in groups:
            for p, grad in _first_with_grad(group):
                reference, version = self._seen.get(id(p), (None, -1))
                if reference is None or reference() is not grad or local(grad)._version != version:
                    return False
        return True


class GradientWatch:
    """A context that tells whether gradients have been added to, dropped or replaced in it; clipping changes no more.

    FSDP2 adds to a DTensor's gradient behind its back, so that of those every change counts.

    Args:
        params: whose gradients are watched.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params, self._grads = params, take(params)
        self._versions = [local(g)._version if g is not None and is_dtensor(g) else None for g in self._grads]
        self._added = False
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._note) for p in self._params if p.requires_grad and p.is_leaf
        ]

    def _note(self, _: Tensor) -> None:
        self._added = True

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def has_changed(self) -> bool:
        """Whether they are others than at first."""
        return self._added or not all(map(self._is_kept, self._params, self._grads, self._versions))

    @staticmethod
    def _is_kept(param: Tensor, grad: Tensor | None, version: int | None) -> bool:
        return param.grad is grad and (grad is None or version is None or local(grad)._version == version)


def follow_steps(base: Optimizer, run: Any) -> None:
    """Let every step of the base optimizer, whoever calls it, consume the gradients; refuse one from perturbed weights.

    Args:
        base: the base optimizer; its own step is replaced by a fused one all the same, see `is_fusable`.
        run: the `StepState` of the optimizer around it, which the base does not keep alive.
    """
    reference = weakref.ref(run)

    def refuse(stepped: Optimizer, *_: object) -> None:
        run = reference()
        if run is not None and run.backup.valid:
            raise RuntimeError(
                f"{type(stepped).__name__}.step() while the weights are perturbed would be undone when they are "
                "restored; leave the descent() context first, or call second_step() or restore()"
            )

    def follow(stepped: Optimizer, *_: object) -> None:
        run = reference()
        if run is not None:
            run.consumed.set(stepped.param_groups)

    refuse.only_watches = follow.only_watches = True  # type: ignore[attr-defined]
    # Not by the functions that register them, which fail where a base keeps its hooks in plain dicts.
    base._optimizer_step_pre_hooks[id(refuse)] = refuse
    base._optimizer_step_post_hooks[id(follow)] = follow


def _first_with_grad(group: dict) -> list[tuple[Tensor, Tensor]]:
    for p in group["params"]:
        if p.grad is not None:
            return [(p, p.grad)]
    return []


def refuse_fresh(consumed: ConsumedMark, groups: Sequence[dict]) -> None:
    """Raise RuntimeError if p.grad holds gradients that a closure, which makes its own, would lose."""
    if consumed.covers(groups):
        return
    # The values are read on the host only before an error: gradients that are all zeros may be lost.
    if not any(bool(p.grad.any()) for p in flat(groups) if p.grad is not None):
        return
    raise RuntimeError(
        "step(closure) found gradients that no step has used: the closure runs backward itself, so they would be lost. "
        "Call zero_grad() first if nobody needs them, such as those that another loss has left here. Else drop the "
        "backward() before it, or use `with opt.ascent(): ...` and `with opt.descent(): ...` around your own "
        "backwards, then opt.step()."
    )
