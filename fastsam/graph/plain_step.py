"""A step of a plain torch optimizer on per-sample losses, in the form that every fastsam optimizer has."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.kernels.tensor_list import Backup
from fastsam.two_pass.batch import read_batch
from fastsam.two_pass.capture import Capturable
from fastsam.two_pass.loss_function import check_losses
from fastsam.two_pass.optimizer import TwoPassOptimizer
from fastsam.two_pass.restore_step import not_in_a_kernel, restore_and_step, steps_in_a_kernel
from fastsam.two_pass.scaler_target import ScalerTarget


def as_stepper(optimizer: Optimizer, fused: bool = False) -> Any:
    """Return what takes the optimizer's steps as `step(loss_fn, *batch)`: a fastsam optimizer itself does."""
    return optimizer if isinstance(optimizer, TwoPassOptimizer) else PlainOptimizerStep(optimizer, fused)


class PlainOptimizerStep(Capturable):
    """Takes steps of `optimizer` as `step(loss_fn, *batch)`.

    Args:
        optimizer: any torch optimizer whose `step()` needs no closure.
        fused: take the step in fastsam's kernel for SGD, Adam and AdamW, which equals torch's to rounding and reads
            nothing on the host; then `optimizer` has to be one for which `steps_in_a_kernel` holds.
    """

    def __init__(self, optimizer: Optimizer, fused: bool = False) -> None:
        self.optimizer, self.fused = optimizer, fused
        self._scaler_target: Any = ScalerTarget(self) if fused else optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    def check_groups(self) -> None:
        """Look at nothing: a torch optimizer's settings are its own."""

    def step(
        self,
        loss_fn: Callable[..., Any],
        *batch: Any,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
    ) -> Tensor:
        """Run forward, backward and step; arguments, result and errors as those of `SAM.step`."""
        read = read_batch(batch)
        self.optimizer.zero_grad()
        losses = check_losses(read.guarded(loss_fn)(*read), read.n)
        loss = losses.objective()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip_grad_norm is not None:
            if scaler is not None:
                scaler.unscale_(self._scaler_target)
            torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], clip_grad_norm)
        if scaler is not None:
            scaler.step(self._scaler_target)
        else:
            self._update(None, None)
        return loss.detach()

    def why_not_capturable(self, scaler: Any) -> str | None:
        """Return why no step can be captured, if so."""
        return None if steps_in_a_kernel(self.optimizer) else not_in_a_kernel(self.optimizer)

    def _discard(self) -> None:
        if self.fused:
            self._scaler_target.forget()

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if not self.fused:
            self.optimizer.step()
            return
        restore_and_step(self.optimizer, Backup([]), grad_scale, found_inf)
        # For hooks, which run after a skipped step too.
        vars(self.optimizer)["found_inf"] = found_inf
        try:
            for hook in self.optimizer._optimizer_step_post_hooks.values():
                hook(self.optimizer, (), {})
        finally:
            del vars(self.optimizer)["found_inf"]
