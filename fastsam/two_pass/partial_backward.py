"""A backward that computes the gradients of some parameters alone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import FunctionCtx


def run_backward(loss: Tensor, leaves: Sequence[Tensor] | None, gradient: Tensor | None = None) -> None:
    """Run backward from a loss, and leave out what these parameters' gradients do not need, where that changes none.

    Torch looks for the parameters in the loss's graph, where those that an `autograd.Function` uses inside cannot be
    seen: a reentrant checkpoint runs a backward of its own in its backward, and adds to their gradients there. Left
    out, it would take its part of their gradients along, without a word. A graph with such functions therefore runs
    the whole backward.

    Args:
        loss: 0-dim.
        leaves: parameters whose gradients are needed; None for all.
        gradient: what goes back from the loss, 0-dim. Default: 1.
    """
    some = [p for p in leaves or () if p.requires_grad]
    if some and not _holds_functions(loss):
        loss.backward(gradient, inputs=some)
    else:
        loss.backward(gradient)


def _holds_functions(loss: Tensor) -> bool:
    """Whether the graph of a loss holds an `autograd.Function` that may run a backward of its own."""
    seen = {loss.grad_fn}
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if isinstance(node, FunctionCtx) and not getattr(node, "runs_no_backward", False):
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return False
