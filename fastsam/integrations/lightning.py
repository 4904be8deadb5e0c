"""Lightning: a callback after which automatic optimization takes both passes, and logs and counts the first alone."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastsam.integrations import INSTALL, unwrapped
from fastsam.two_pass.interrupts import Pass
from fastsam.two_pass.optimizer import TwoPassOptimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torchmetrics import Metric, MetricCollection
except ImportError as error:
    raise ImportError(f"fastsam.integrations.lightning needs lightning; {INSTALL}") from error

_HANDED = "what configure_optimizers returns"


class SAMCallback(Callback):
    """`Trainer(callbacks=[SAMCallback()])`: for modules whose `configure_optimizers` returns fastsam optimizers.

    The optimizers are told of the wrapped model, with which DistributedDataParallel and batch norm are handled. With
    automatic optimization `training_step` runs twice in a step, in both passes, and:

    - what the second pass logs is dropped, and metrics (torchmetrics) that are modules of the module do not see it;
      what a module keeps in other Python objects sees both passes;
    - `on_before_backward`, `on_after_backward`, `on_before_zero_grad` and `on_before_optimizer_step` run once;
    - clipping, by norm or by value, is of the final gradient alone;
    - with `accumulate_grad_batches` each batch is perturbed by itself.

    Methods that use a part of the rows (`ESAM` with gamma < 1, `MSAM`) need manual optimization, where `training_step`
    calls `opt.backward(losses, x, y, backward=self.manual_backward)` and `opt.step()`; all of it runs there.
    """

    def __init__(self) -> None:
        self._class: type[LightningModule] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the wrapped model to the optimizers, and let the module take both passes.

        Raises:
            TypeError: an optimizer is none of fastsam's.
            RuntimeError: automatic optimization with a method that needs rows.
        """
        optimizers = [unwrapped(optimizer, _HANDED) for optimizer in trainer.optimizers]
        for opt in optimizers:
            opt.bind(trainer.strategy.model)
        if not pl_module.automatic_optimization:
            return
        (opt,) = optimizers
        if opt.needs_rows():
            raise RuntimeError(
                f"{type(opt).__name__} needs one loss for each row, which automatic optimization does not hand over; "
                "set self.automatic_optimization = False, and in training_step call opt.zero_grad(), "
                "opt.backward(losses, x, y, backward=self.manual_backward) and opt.step(), with opt = self.optimizers()"
            )
        pl_module._passes = _Passes(opt, pl_module)
        self._class = type(pl_module)
        pl_module.__class__ = type(self._class.__name__, (_TakesBothPasses, self._class), {})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo what is left of a step, and let the module be what it was."""
        self._put_back(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the module be what it was."""
        self._put_back(pl_module)

    def _put_back(self, pl_module: LightningModule) -> None:
        if self._class is not None:
            pl_module._passes.drop()
            pl_module.__class__, self._class = self._class, None
            del pl_module._passes


class _Passes:
    """What a module knows of the step that it is in.

    Args:
        opt: the optimizer.
        module: whose metrics get stand-ins for second passes.
    """

    def __init__(self, opt: TwoPassOptimizer, module: nn.Module) -> None:
        self.opt = opt
        self.is_second = False
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._first: Pass | None = None
        is_metric = (Metric, MetricCollection)
        places = [
            (parent, name, child)
            for parent in module.modules()
            if not isinstance(parent, is_metric)
            for name, child in parent.named_children()
            if isinstance(child, is_metric)
        ]
        self._metrics = [(parent, name, child, child.clone()) for parent, name, child in places]

    def begin_first(self, grad_scale: float | None) -> None:
        """Enter the first pass, which a later call leaves."""
        self._first = self.opt.ascent(grad_scale)
        self._first.__enter__()

    def leave_first(self) -> None:
        """Leave the first pass: well, or as the exception that is being handled says."""
        if self._first is not None:
            first, self._first = self._first, None
            first.__exit__(*sys.exc_info())

    def drop(self) -> None:
        """Undo a first pass that nobody will follow."""
        if self._first is not None:
            self.leave_first()
            self.opt.restore()

    @contextmanager
    def second(self) -> Iterator[None]:
        """Context for the second pass: metrics are others, and nothing is logged."""
        for parent, name, _, stand_in in self._metrics:
            stand_in.reset()
            setattr(parent, name, stand_in)
        self.is_second = True
        try:
            yield
        finally:
            self.is_second = False
            for parent, name, metric, _ in self._metrics:
                setattr(parent, name, metric)


class _TakesBothPasses(LightningModule):
    """In front of a module's class while it is fitted."""

    _passes: _Passes

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        passes = self._passes
        if passes.is_second:
            return super().training_step(*args, **kwargs)
        scaler = _scaler_of(self)
        passes.begin_first(scaler.get_scale() if scaler is not None and passes.opt.state_holds_scale else None)
        passes.arguments = args, kwargs
        try:
            output = super().training_step(*args, **kwargs)
        except BaseException:
            passes.leave_first()
            raise
        if _loss_in(output) is None:
            passes.drop()
        return output

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        passes, opt = self._passes, self._passes.opt
        has_second = opt.needs_second_pass
        try:
            super().backward(loss, *args, **kwargs)
        finally:
            passes.leave_first()
        if not has_second:
            return
        with opt.descent(), passes.second():
            # through the strategy, as the first forward: DDP arms itself there
            positional, named = passes.arguments
            again = _loss_in(self.trainer.strategy.training_step(*positional, **named))
            if again is None:
                raise RuntimeError("training_step returned a loss in the first pass and None in the second")
            again, scaler = again / self.trainer.accumulate_grad_batches, _scaler_of(self)
            super().backward(again if scaler is None else scaler.scale(again), *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        # the passes come first, so that hooks and clipping find the final gradient
        loss = None if optimizer_closure is None else optimizer_closure()
        if loss is not None:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)

    def log(self, *args: Any, **kwargs: Any) -> None:
        if not self._passes.is_second:
            super().log(*args, **kwargs)


def _scaler_of(module: LightningModule) -> Any:
    return getattr(module.trainer.precision_plugin, "scaler", None)


def _loss_in(output: Any) -> Tensor | None:
    return output.get("loss") if isinstance(output, dict) else output
