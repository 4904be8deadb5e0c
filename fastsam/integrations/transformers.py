"""Hugging Face's Trainer: `class SAMTrainer(SAMTrainerMixin, Trainer)` takes both passes in its training step."""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsam.integrations import INSTALL, unwrapped
from fastsam.two_pass.losses import Weighted
from fastsam.two_pass.optimizer import TwoPassOptimizer

try:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(f"fastsam.integrations.transformers needs transformers; {INSTALL}") from error

_IGNORED = -100
_HANDED = "Trainer(optimizers=(SAM(...), scheduler)) or Trainer(optimizer_cls_and_kwargs=(SAM, {...}))"


class SAMTrainerMixin:
    """Put before `Trainer`: its training step then runs both passes of the fastsam optimizer that it was given.

    Everything else is the Trainer's own: accumulation (every micro-batch is perturbed by itself), the token mean over
    accumulated batches and ranks, label smoothing, `compute_loss_func`, mixed precision, clipping, DDP, checkpoints.
    The loss that it logs is the first pass's. The optimizer is told of the wrapped model by itself.

    Methods that use a part of the rows (`ESAM` with gamma < 1, `MSAM`) take their losses from `compute_losses`.

    Example::

        class SAMTrainer(SAMTrainerMixin, Trainer):
            pass

        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-4)
        SAMTrainer(model, args, train_dataset=data, optimizers=(opt, None)).train()
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run both passes on a micro-batch, in place of the Trainer's forward and backward.

        Args:
            model: the wrapped model.
            inputs: the model's, of n rows each.
            num_items_in_batch: items of all micro-batches of the step, over all ranks; None where nobody counts.

        Returns:
            The first pass's loss, detached, as the Trainer logs it.

        Raises:
            TypeError: the optimizer is none of fastsam's.
            RuntimeError: DeepSpeed, DataParallel, or context or sequence parallelism.
        """
        trainer: Any = self
        opt = unwrapped(trainer.optimizer, _HANDED)
        self._refuse_engines(opt)
        if opt.model is not model and (opt.model is None or isinstance(opt.model, nn.Module)):
            opt.bind(model)
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        inputs, steps = trainer._prepare_inputs(inputs), trainer.current_gradient_accumulation_steps
        is_scaled = [self._is_scaled(num_items_in_batch)]

        def loss_of_all() -> Tensor:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)

        def losses_of_rows(rows: dict[str, Any]) -> Any:
            with trainer.compute_loss_context_manager():
                losses = trainer.compute_losses(model, rows, num_items_in_batch)
            # a total is that of all micro-batches
            is_scaled[0] = isinstance(losses, Weighted) and losses.total is not None
            return losses

        def share(loss: Tensor) -> Tensor:
            return loss if is_scaled[0] else loss / steps

        def backward(loss: Tensor) -> None:
            trainer.accelerator.backward(share(loss))

        if opt.needs_rows():
            return share(opt.backward(losses_of_rows, inputs, backward=backward))
        return share(opt.backward(loss_of_all, backward=backward))

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Return whether `compute_loss` divides by the items of all micro-batches."""
        trainer: Any = self
        if trainer.loss_is_scaled_for_ga is not None:
            return trainer.loss_is_scaled_for_ga
        counts = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counts or trainer.compute_loss_func is not None

    def _refuse_engines(self, opt: TwoPassOptimizer) -> None:
        trainer: Any = self
        parallelism = getattr(trainer.accelerator, "parallelism_config", None)
        for is_there, what in (
            (trainer.is_deepspeed_enabled, "DeepSpeed, which owns the step: use DDP or FSDP2"),
            (trainer.args.n_gpu > 1, "DataParallel, which has no wrapper to reduce: start one process for each GPU"),
            (parallelism is not None and parallelism.cp_enabled, "context parallelism"),
            (parallelism is not None and parallelism.sp_enabled, "sequence parallelism"),
        ):
            if is_there:
                raise RuntimeError(f"{type(opt).__name__} cannot be trained with {what}")

    def compute_losses(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Return the losses of the rows, for methods that use a part of them. Override it for other models.

        By default the cross-entropy of `labels`, with the Trainer's label smoothing: of rows (labels of shape [n],
        logits [n, C]), or of tokens (labels [n, t], logits [n, t, C], of which causal language models shift one against
        the other), where -100 does not count.

        Args:
            model: the wrapped model.
            inputs: those of a part of the rows, a dict of the call's own.
            num_items_in_batch: as in `training_step`.

        Returns:
            Losses, shape [n], whose mean over the micro-batch and over micro-batches is the objective; or a
            `fastsam.Weighted`, which is taken as it is where it has a total.

        Raises:
            TypeError: labels or outputs of another kind, or a loss function of the Trainer's.
        """
        trainer: Any = self
        labels: Any = inputs.get("labels")
        if trainer.compute_loss_func is not None or not isinstance(labels, Tensor):
            self._refuse_rows("a compute_loss_func" if isinstance(labels, Tensor) else "no labels")
        logits = _logits(model(**{name: value for name, value in inputs.items() if name != "labels"}))
        if labels.dtype != torch.long or labels.dim() != logits.dim() - 1 or not 1 <= labels.dim() <= 2:
            self._refuse_rows(f"labels of shape {list(labels.shape)} and logits of shape {list(logits.shape)}")
        if labels.dim() == 2 and self._is_causal(model):
            labels, logits = labels[:, 1:], logits[:, :-1]
        losses = F.cross_entropy(
            logits.float().flatten(0, -2),
            labels.flatten(),
            ignore_index=_IGNORED,
            reduction="none",
            label_smoothing=trainer.args.label_smoothing_factor,
        )
        total = num_items_in_batch
        if total is not None and trainer.args.average_tokens_across_devices:
            total = total / trainer.accelerator.num_processes
        return Weighted(losses.view(labels.shape), labels != _IGNORED, total)

    def _is_causal(self, model: nn.Module) -> bool:
        inner: Any = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _refuse_rows(self, what: str) -> NoReturn:
        method = type(unwrapped(self.optimizer, _HANDED)).__name__  # type: ignore[attr-defined]
        raise TypeError(
            f"{method} needs one loss for each row, which compute_losses cannot make of {what}; override "
            "compute_losses(model, inputs, num_items_in_batch) in the Trainer"
        )


def _logits(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]
