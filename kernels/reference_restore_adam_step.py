"""Reference implementation of the restore of the weights fused with the step of Adam or AdamW."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.kernels.reference_restore_step import DenseLists, alike, restore_from, skip_flag, to_device_of


class AdamOptions(NamedTuple):
    """Hyperparameters of torch.optim.Adam, or with `decoupled` of AdamW, for one tensor."""

    lr: float | Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False


@torch.no_grad()
def restore_adam_step_(
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    options: Sequence[AdamOptions],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Set each weight to its source, then take torch.optim.Adam's or AdamW's step from there.

    Args:
        weights: tensors to update in place.
        sources: for each weight its backup, or the weight itself where it was not perturbed.
        grads: final gradients; divided in place by `grad_scale` if given.
        exp_avgs: first moments, updated in place.
        exp_avg_sqs: second moments, updated in place.
        max_exp_avg_sqs: largest second moments so far, updated in place; None without amsgrad.
        steps: 0-dim float32 step counters on the weights' devices, advanced in place.
        options: hyperparameters for each tensor.
        grad_scale: 0-dim float32 tensor, a GradScaler's scale; None means the gradients are unscaled.
        found_inf: 0-dim float32 tensor; where it is not 0, weights are restored and nothing else changes.
    """
    restore_from(weights, sources)
    for rows in alike(options, weights, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs):
        o, counters = options[rows[0]], [steps[i] for i in rows]
        largest = [x for i in rows if (x := max_exp_avg_sqs[i]) is not None]
        lists = DenseLists(*([source[i] for i in rows] for source in (weights, grads, exp_avgs, exp_avg_sqs)), largest)
        inf = skip_flag(weights[rows[0]], found_inf)
        torch._foreach_add_(counters, 1)
        step = torch._fused_adamw_ if o.decoupled else torch._fused_adam_
        step(  # type: ignore[call-overload]
            *lists.tensors, counters,
            lr=o.lr, beta1=o.beta1, beta2=o.beta2, weight_decay=o.weight_decay, eps=o.eps, amsgrad=o.amsgrad,
            maximize=o.maximize, grad_scale=to_device_of(weights[rows[0]], grad_scale), found_inf=inf,
        )  # fmt: skip
        if inf is not None:
            torch._foreach_sub_(counters, [inf] * len(counters))
        lists.write_back()
