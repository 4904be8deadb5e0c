"""What SAF and MESA share. Sharpness-Aware Training for Free (Du et al. 2022, https://arxiv.org/abs/2205.14083).

    z      = f_w(x)
    t      = z of `lag` epochs ago, of the same sample        (SAF, Eq. 9)
    t      = f_v(x), v <- decay v + (1 - decay) w             (MESA, Eq. 10, 13)
    loss   = CE(z, y) + lam tau^2 KL(softmax(t / tau) || softmax(z / tau))

The sharpness of the path that training takes is small where the outputs hardly change along it. Both leave the base
optimizer's single forward and backward as they are. tau^2 stands in the authors' code, not in the paper
(docs/algorithms.md#r-22).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torch.compiler.disable would import the compiler, and Triton with it.
from torch._compile import _disable_dynamo as uncompiled

from fastsam.arguments import LARGEST, LARGEST_INTEGER, check_choice, check_flag, check_integer, check_number
from fastsam.kernels import ops
from fastsam.kernels.past import Past

__all__ = ["Trajectory", "uncompiled"]


class _TrajectoryLoss(torch.autograd.Function):
    """One kernel computes the loss and its gradient; backward only scales the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, past: Past, options: dict[str, Any]) -> Tensor:
        loss, gradient, scale = ops.trajectory_loss(logits.detach(), targets, past, **options)
        ctx.save_for_backward(gradient, scale)
        # ESAM's first pass may leave gradients out of a graph with this function.
        ctx.runs_no_backward = True
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, scale = ctx.saved_tensors
        # The factor is not rounded to 16 bits, in which a loss scale may overflow.
        factor = (grad_output * scale).view(-1, 1)
        return (gradient * factor).to(gradient.dtype), None, None, None


class Trajectory(nn.Module):
    """What both losses share: cross-entropy, and from the epoch after `start_epoch` on the divergence from the past.

    The arguments are those of `SAF` and `MESA`, where they are described.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, named with its value.
    """

    keeps_own_state = True
    """Tells an optimizer around the model of which the loss is a part that it keeps its state to one pass by itself."""

    def __init__(
        self,
        lam: float,
        tau: float,
        start_epoch: int,
        label_smoothing: float,
        tau_squared: bool,
        ignore_index: int,
        reduction: str,
    ) -> None:
        super().__init__()
        check_number("lam", lam, lambda value: value >= 0, ">= 0")
        check_number("tau", tau, lambda value: value > 0, "> 0")
        check_number("label_smoothing", label_smoothing, lambda value: 0 <= value <= 1, "in [0, 1]")
        check_integer("start_epoch", start_epoch, 0)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_flag("tau_squared", tau_squared)
        check_integer("ignore_index", ignore_index, -LARGEST_INTEGER, LARGEST_INTEGER)
        if tau_squared and float(lam) * float(tau) ** 2 > LARGEST:
            raise ValueError(f"lam={lam} times the square of tau={tau} must be within float32, at most {LARGEST:.3g}")
        self.lam, self.tau, self.start_epoch, self.tau_squared = lam, tau, start_epoch, tau_squared
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction
        self.epoch = 1

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"lam={self.lam}, tau={self.tau}, start_epoch={self.start_epoch}, epoch={self.epoch}"

    @property
    def active(self) -> bool:
        """Whether the divergence is part of the loss: in training mode, with lam > 0, after epoch `start_epoch`."""
        return self.training and self.lam > 0 and self.epoch > self.start_epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1 as in the paper.

        Raises:
            TypeError: the epoch is no integer.
            ValueError: it is below 1.
        """
        check_integer("epoch", epoch, 1)
        self.epoch = epoch

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        if logits.dim() != 2 or not logits.is_floating_point():
            raise ValueError(f"logits must be floating and [n, classes], got {list(logits.shape)} {logits.dtype}")
        n, classes = logits.shape
        as_classes = targets.shape == (n,) and not targets.is_floating_point()
        if not as_classes and not (targets.shape == (n, classes) and targets.is_floating_point()):
            raise ValueError(
                f"targets must be [{n}] class indices or [{n}, {classes}] probabilities, got {list(targets.shape)} "
                f"{targets.dtype}"
            )

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits,
            targets,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )

    def _loss(self, logits: Tensor, targets: Tensor, past: Past) -> Tensor:
        options = {
            "tau": self.tau,
            "weight": self.lam * (self.tau**2 if self.tau_squared else 1.0),
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }
        return _TrajectoryLoss.apply(logits, targets, past, options)
