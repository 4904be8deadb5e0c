"""The base optimizer's step on restored weights: fused with the restore where the base allows it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastsam.distributed.dtensor import any_over_ranks, are_plain, laid_out_as, local, locals_of, placement
from fastsam.kernels import ops
from fastsam.kernels.calls import Call, run_all
from fastsam.kernels.reference import AdamOptions, SGDOptions
from fastsam.kernels.replay_tables import Refreshable
from fastsam.kernels.tensor_list import Backup
from fastsam.two_pass.gradients import are_odd


class Update(NamedTuple):
    """An update that is prepared, of which nothing has run."""

    calls: list[Call]
    """Restore the weights and take the base's step; to be run as one."""
    found_inf: Tensor | None
    """0-dim, not 0 if the step is skipped; None if nobody has looked."""
    is_run: bool
    """Whether the base's step is run, be it one that skips on the device."""
    is_foreign: bool
    """Whether it is the base's own, which nobody can undo, and not one of our kernels."""


@torch.no_grad()
def prepare(
    base: Optimizer,
    backup: Backup,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check_finite: bool,
    skip: Tensor | None = None,
    is_alone: bool = False,
) -> Update:
    """Prepare to restore the weights and take the base's step with the gradients in p.grad, if these are finite.

    Args:
        base: the base optimizer; steps on every parameter with a gradient.
        backup: what the last perturbation saved; invalid after the update.
        grad_scale: 0-dim tensor that the gradients are divided by, in place; None where they are unscaled.
        found_inf: 0-dim tensor, not 0 where a GradScaler has found inf or NaN; None where nobody has looked.
        check_finite: look, where nobody has.
        skip: 0-dim bool tensor, true where the step is to be skipped anyway.
        is_alone: the step is the base's and nothing else. Without kernels, on the CPU, its own code then takes it, bit
            for bit; kernels take it otherwise, since they read nothing on the host.
    """
    grads = _final_gradients(base)
    if found_inf is None and check_finite and grads:
        entries = grads if are_plain(grads) and not are_odd(grads, grads) else [_entries(g) for g in grads]
        found_inf = any_over_ranks(ops.found_nonfinite(entries), grads)
    if skip is not None and grads:
        also = skip.to(grads[0].device, torch.float32)
        found_inf = also if found_inf is None else torch.maximum(found_inf, also.to(found_inf.device))
    base._opt_called = True  # type: ignore[attr-defined]
    reads_are_free = not any(g.is_cuda for g in grads) and not ops.uses_triton(grads)
    if is_fusable(base) and not (is_alone and reads_are_free):
        return Update(_fused_calls(base, backup, grad_scale, found_inf), found_inf, True, False)
    calls = [*ops.copy_calls(*backup.pending()), backup.discard_call()]
    skips_on_device = getattr(base, "_step_supports_amp_scaling", False) and not any(map(placement, grads))
    if found_inf is not None and base.state and skips_on_device:
        # torch's fused kernels on the CPU skip at 1 alone
        scalars = {"grad_scale": grad_scale, "found_inf": (found_inf != 0).to(torch.float32)}
        calls += [partial(vars(base).update, scalars), partial(run_own_step, base)]
        calls += [partial(vars(base).pop, name, None) for name in scalars]
        return Update(calls, found_inf, True, True)
    if grad_scale is not None:
        reciprocal = grad_scale.double().reciprocal()
        calls += [partial(_entries(g).mul_, reciprocal.to(g.device, torch.float32)) for g in grads]
    # a base that cannot skip on the device
    is_taken = found_inf is None or not bool(found_inf)
    if is_taken:
        calls.append(partial(run_own_step, base))
    return Update(calls, found_inf, is_taken, is_taken)


def _final_gradients(base: Optimizer) -> list[Tensor]:
    """All gradients that there are, spread over ranks as their parameters are."""
    stepped = [p for group in base.param_groups for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in stepped]
    if are_plain(grads):
        return grads
    grads = [laid_out_as(p, p.grad) for p in stepped]
    for p, grad in zip(stepped, grads, strict=True):
        if p.grad is not grad:
            p.grad = grad
    return grads


def _entries(grad: Tensor) -> Tensor:
    """This rank's numbers of a gradient as a strided real tensor that shares its memory."""
    grad = grad._values() if grad.is_sparse else local(grad)
    return torch.view_as_real(grad) if grad.is_complex() else grad


def run_own_step(base: Optimizer) -> None:
    """Run the base optimizer's own step with its own hooks, once each."""
    if not is_stepped_plainly(base):
        base.step()
        return
    args: Any = (base,)
    kwargs: Any = {}
    for pre_hook in base._optimizer_step_pre_hooks.values():
        args, kwargs = pre_hook(base, args, kwargs) or (args, kwargs)
    step: Any = type(base).step
    # exactly one level below torch's wrapper that fires hooks, if any: global ones have fired for the outer step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(*args, **kwargs)
    for post_hook in base._optimizer_step_post_hooks.values():
        post_hook(base, args, kwargs)


def is_stepped_plainly(base: Optimizer) -> bool:
    """Whether nobody replaced this instance's step (a scheduler that only counts calls did not)."""
    patched = vars(base).get("step")
    return patched is None or (
        hasattr(patched, "_wrapped_by_lr_sched") and getattr(patched, "__wrapped__", None) is type(base).step
    )


def is_fusable(base: Optimizer) -> bool:
    """Whether `restore_and_step` may stand in for this base's own step."""
    hooks = (*base._optimizer_step_pre_hooks.values(), *base._optimizer_step_post_hooks.values())
    return steps_in_a_kernel(base) and all(hasattr(hook, "only_watches") for hook in hooks)


def steps_in_a_kernel(base: Optimizer) -> bool:
    """Whether `restore_and_step` does what this optimizer's step does, but for its hooks."""
    return (
        type(base) in (SGD, Adam, AdamW)
        and is_stepped_plainly(base)
        and all(_is_supported(group) for group in base.param_groups)
    )


def not_in_a_kernel(base: Optimizer) -> str:
    """Say why `is_fusable` does not hold."""
    return (
        f"the base step is {type(base).__name__}'s own; fastsam's, which reads nothing on the host, stands for torch's "
        "SGD, Adam and AdamW without step hooks, foreach=, fused=False, complex or sparse parameters"
    )


def _is_supported(group: dict) -> bool:
    # an explicit foreach= or fused=False is the user's choice of implementation, and is respected
    if group.get("foreach") is not None or group.get("fused") is False:
        return False
    tensors = [group["weight_decay"], *group.get("betas", ())]
    return not any(isinstance(value, Tensor) for value in tensors) and not are_odd(
        group["params"], [p.grad for p in group["params"]]
    )


Stepped = list[tuple[dict[str, Any], Tensor]]
"""Each parameter with a gradient, beside its group."""
State = dict[Tensor, dict[str, Any]]
"""An optimizer's state, or a part of it."""


@torch.no_grad()
def restore_and_step(base: Optimizer, backup: Backup, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Restore every weight in `backup` and take a fusable base's step on every parameter with a gradient.

    Args:
        base: an optimizer for which `is_fusable` holds.
        backup: what the last perturbation saved; invalid afterwards.
        grad_scale: 0-dim tensor the gradients are divided by first, in place; None where they are unscaled.
        found_inf: 0-dim tensor; where it is not 0, weights are restored and nothing is stepped.
    """
    run_all(_fused_calls(base, backup, grad_scale, found_inf))
    base._opt_called = True  # type: ignore[attr-defined]


def _fused_calls(base: Optimizer, backup: Backup, grad_scale: Tensor | None, found_inf: Tensor | None) -> list[Call]:
    """Return the calls of `restore_and_step`; state that the base has not made yet appears with the last of them."""
    stepped = [(group, p) for group in base.param_groups for p in group["params"] if p.grad is not None]
    if not stepped or _skips_first_damped_step(base, stepped, found_inf):
        return [*ops.copy_calls(*backup.pending()), backup.discard_call()]
    weights = locals_of([p for _, p in stepped])
    # what was perturbed, but has no final gradient
    calls = ops.copy_calls(*backup.pending(but=weights))
    lists = weights, [backup.of(w) for w in weights], locals_of([p.grad for _, p in stepped])
    new: State = {}
    if type(base) is SGD:
        own = _sgd_lists(base, stepped, new)
        calls += ops.sgd_step_calls(*lists, *own, grad_scale=grad_scale, found_inf=found_inf)
    else:
        moments: tuple[Any, ...] = _adam_lists(base, stepped, new)
        calls += ops.adam_step_calls(*lists, *moments, grad_scale=grad_scale, found_inf=found_inf)
    return [*calls, partial(base.state.update, new), backup.discard_call()]


def _skips_first_damped_step(base: Optimizer, stepped: Stepped, found_inf: Tensor | None) -> bool:
    """Whether a skip meets dampening's first step, whose buffer is the gradient itself: the one case read on the host.

    Everywhere else a buffer of zeros, which a skipped step leaves as it is, starts the momentum just as well.
    """
    return (
        found_inf is not None
        and any(group.get("dampening") for group in base.param_groups)
        and any(
            g.get("dampening") and g["momentum"] and "momentum_buffer" not in base.state.get(p, ()) for g, p in stepped
        )
        and bool(found_inf)
    )


def _sgd_lists(base: Optimizer, stepped: Stepped, new: State) -> tuple[list[Tensor | None], list[SGDOptions]]:
    """Return SGD's buffers and options; `new` takes the state of parameters that have no buffer yet."""
    per_group = {id(group): _sgd_options(group) for group in base.param_groups}
    buffers: list[Tensor | None] = []
    options: list[SGDOptions] = []
    for group, p in stepped:
        o, buffer = per_group[id(group)], None
        if o.momentum != 0:
            state = base.state.get(p, {})
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = torch.zeros_like(p)
                new[p] = {**state, "momentum_buffer": buffer}
                # torch does not damp the first gradient.
                o = o._replace(dampening=0.0)
        buffers.append(buffer)
        options.append(o)
    return locals_of(buffers), _refreshable(options, base, stepped, _sgd_options)


def _refreshable(
    options: Sequence[Any], base: Optimizer, stepped: Stepped, options_of: Callable[[dict[str, Any]], Any]
) -> Refreshable:
    """Return options that a replay of the step takes from the groups as they are by then."""

    def refresh() -> list[Any]:
        per_group = {id(group): options_of(group) for group in base.param_groups}
        return [per_group[id(group)] for group, _ in stepped]

    return Refreshable(options, refresh)


def _sgd_options(group: dict[str, Any]) -> SGDOptions:
    return SGDOptions(
        lr=group["lr"],
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _adam_lists(
    base: Optimizer, stepped: Stepped, new: State
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor], list[AdamOptions]]:
    """Return Adam's moments, counters and options; `new` takes the state of parameters that have none yet."""
    per_group = {id(group): _adam_options(group) for group in base.param_groups}
    states = []
    for group, p in stepped:
        state = base.state.get(p, {})
        if "step" not in state:
            state = new[p] = {**state, "step": torch.zeros((), dtype=torch.float32, device=p.device)}
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p)
        # torch keeps the counters of its unfused Adam on the host; a step that may be skipped on the device cannot
        step = state["step"].to(p.device, torch.float32)
        if step is not state["step"]:
            state = new[p] = {**state, "step": step}
        states.append(state)
    return (
        locals_of([state["exp_avg"] for state in states]),
        locals_of([state["exp_avg_sq"] for state in states]),
        locals_of([state.get("max_exp_avg_sq") for state in states]),
        [state["step"] for state in states],
        _refreshable([per_group[id(group)] for group, _ in stepped], base, stepped, _adam_options),
    )


def _adam_options(group: dict[str, Any]) -> AdamOptions:
    return AdamOptions(
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )
