"""timm: a scaler for its training loop, whose one line runs backward and takes the step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastsam.integrations import INSTALL, unwrapped

try:
    from timm.utils import NativeScaler, dispatch_clip_grad
except ImportError as error:
    raise ImportError(f"fastsam.integrations.timm needs timm; {INSTALL}") from error


class SAMScaler(NativeScaler):
    """timm's `NativeScaler`, which is given the loss function and its batch in place of the loss, and runs both passes.

    In timm's loop `loss = loss_scaler(losses, optimizer, batch=(input, target), clip_grad=..., parameters=...)` stands
    for the forward and for `loss_scaler(loss, optimizer, ...)`. Its checkpoints are the NativeScaler's.

    Args:
        device: of the GradScaler.
        enabled: scale losses, as float16 needs; without, this is a loop in float32 or bfloat16.
    """

    def __init__(self, device: str = "cuda", enabled: bool = True) -> None:
        super().__init__(device=device)
        if not enabled:
            self._scaler = torch.amp.GradScaler(device=device, enabled=False)

    def __call__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: Any,
        batch: tuple[Any, ...] = (),
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
        accum_steps: int = 1,
    ) -> Tensor:
        """Run both passes on a batch, and where `need_update` says so clip and take the step.

        Args:
            loss_fn: function of the batch that returns one loss for each row, or 0-dim where the method needs no rows;
                without a division by `accum_steps`.
            optimizer: of fastsam.
            batch: the arguments of `loss_fn`.
            clip_grad, clip_mode, parameters: as for the NativeScaler; of the final gradient alone.
            create_graph: must be False.
            need_update: whether this batch ends the step; batches before it accumulate, each perturbed by itself.
            accum_steps: how many batches make a step, by which each loss is divided; 1 where the loss function returns
                `fastsam.Weighted` with the total of them all.

        Returns:
            The first pass's mean loss, detached.

        Raises:
            TypeError: a loss in place of a loss function, or an optimizer that is none of fastsam's.
            ValueError: create_graph, which a base of second order would ask for, or clip_grad without parameters.
        """
        opt = unwrapped(optimizer, "timm.utils' loss_scaler(losses, optimizer, batch=...)")
        if isinstance(loss_fn, Tensor) or not callable(loss_fn):
            raise TypeError(
                f"SAMScaler takes the loss function, which it calls in both passes, got {type(loss_fn).__name__}; call "
                "loss_scaler(losses, optimizer, batch=(input, target), ...)"
            )
        if create_graph:
            raise ValueError("create_graph=True is for bases of second order, which fastsam does not take")
        if clip_grad is not None and parameters is None:
            raise ValueError("clip_grad needs parameters; pass timm.models.model_parameters(model)")
        scale = self._scaler.scale
        loss = opt.backward(loss_fn, *batch, backward=lambda loss: scale(loss / accum_steps).backward())
        if need_update:
            if clip_grad is not None:
                self._scaler.unscale_(opt)
                dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
            self._scaler.step(opt)
            self._scaler.update()
        return loss
