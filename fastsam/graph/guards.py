"""Guards of a captured step: everything outside the loss that Python went by, and is cheap to look at."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.two_pass.gradients import flat
from fastsam.two_pass.module_state import modules_of
from fastsam.two_pass.restore_step import steps_in_a_kernel
from fastsam.two_pass.snapshot import has_value, slots_of
from fastsam.two_pass.wrapper import COUNTERS

_REFRESHED = ("lr", "momentum", "dampening", "weight_decay", "betas", "eps")
"""Settings of SGD, Adam and AdamW that a replay reads from tables on the device."""
_address: Any = Tensor.data_ptr
_requires_grad, _training = operator.attrgetter("requires_grad"), operator.attrgetter("training")


class Guards:
    """Looks at whatever takes steps.

    Args:
        stepper: a fastsam optimizer, or a `PlainOptimizerStep`.
    """

    def __init__(self, stepper: Any) -> None:
        self._stepper = stepper
        self._base: Optimizer = getattr(stepper, "base_optimizer", None) or stepper.optimizer
        self._optimizers = [self._base] + ([stepper] if isinstance(stepper, Optimizer) else [])
        models = modules_of(getattr(stepper, "model", None))
        self._modules = [module for model in models for module in model.modules()]
        # what these depend on is looked at too
        self._refreshed = (*(_REFRESHED if steps_in_a_kernel(self._base) else ()), *stepper.refreshed)

    def now(self) -> dict[str, Any]:
        """Return what a capture made now would be good for, by words for it."""
        followed, groups = {"params", *COUNTERS, *self._refreshed}, self._stepper.param_groups
        params = flat(groups)
        device = params[0].device.type
        states = [t for p in params for t in self._base.state.get(p, {}).values() if isinstance(t, Tensor)]
        hooks = [(*o._optimizer_step_pre_hooks, *o._optimizer_step_post_hooks) for o in self._optimizers]
        hooks += [tuple(o._run.followers) for o in self._optimizers if hasattr(o, "_run")]
        options = {k: v for k, v in vars(self._stepper).items() if isinstance(v, (bool, int, float, str))}
        buffers = [slot.held for slot in slots_of(self._modules, "_buffers")]
        # not what a step leaves there
        guarded = {f"the optimizer's {k}": v for k, v in options.items() if not k.startswith(("_", "last_"))}
        for i, group in enumerate(groups):
            guarded |= {f"{key} of group {i}": value for key, value in group.items() if key not in followed}
            guarded[f"the kind of lr of group {i}"] = _kind(group.get("lr"))
            guarded[f"whether group {i} has momentum"] = bool(group.get("momentum"))
        return guarded | {
            "the parameters' memory": tuple(map(_address, params)),
            "requires_grad of the parameters": tuple(map(_requires_grad, params)),
            "the optimizer's state": tuple(map(_address, states)),
            "the optimizer's step hooks": hooks,
            "the mode of the model": tuple(map(_training, self._modules)),
            "the memory of the model's buffers": tuple([b.data_ptr() for b in buffers if has_value(b)]),
            "whether the step perturbs": self._stepper.is_active,
            "autocast": torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        }

    def numbers(self) -> list[Any]:
        """Return what the tables of a capture follow. A tensor on the device is followed by the kernel itself."""
        settings = [_on_host(group.get(key)) for group in self._stepper.param_groups for key in self._refreshed]
        return [self._stepper.radius_scale, *settings]


def change(now: dict[str, Any], then: dict[str, Any]) -> str | None:
    """Return the first thing that is another now, in words; None if all is as it was."""
    if now == then:
        return None
    return next(name for name in (*now, *then) if name not in now or name not in then or now[name] != then[name])


def _kind(lr: Any) -> Any:
    """Where the kernels find a learning rate: behind the address of a tensor, or in their tables."""
    return lr.data_ptr() if isinstance(lr, Tensor) else None


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" else None
    return value
