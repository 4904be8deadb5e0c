"""Reference implementation of the restore of the weights fused with the step of Adam or AdamW."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.kernels.calls import Call, run_all
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


def restore_adam_step_(*lists: Any, **scalars: Any) -> None:
    """Set each weight to its source and take Adam's or AdamW's step from there; see `ops.restore_adam_step_`."""
    run_all(adam_step_calls(*lists, **scalars))


def adam_step_calls(
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    options: Sequence[AdamOptions],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[Call]:
    """Return the calls of Adam's or AdamW's step; see `ops.adam_step_calls`."""
    calls = restore_from(weights, sources)
    for positions in alike(options, weights, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs):
        o, counters = options[positions[0]], [steps[i] for i in positions]
        largest = [x for i in positions if (x := max_exp_avg_sqs[i]) is not None]
        lists = DenseLists(
            *([source[i] for i in positions] for source in (weights, sources, grads, exp_avgs, exp_avg_sqs)), largest
        )
        inf = skip_flag(weights[positions[0]], found_inf)
        step = partial(
            torch._fused_adamw_ if o.decoupled else torch._fused_adam_,
            *lists.tensors, counters,
            lr=o.lr, beta1=o.beta1, beta2=o.beta2, weight_decay=o.weight_decay, eps=o.eps, amsgrad=o.amsgrad,
            maximize=o.maximize, grad_scale=to_device_of(weights[positions[0]], grad_scale), found_inf=inf,
        )  # fmt: skip
        calls += [partial(torch._foreach_add_, counters, 1), step]
        if inf is not None:
            calls.append(partial(torch._foreach_sub_, counters, [inf] * len(counters)))
        calls += lists.write_back()
    return calls
