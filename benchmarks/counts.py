"""What a step does besides taking time: rows through the model, launches, host reads. Never counted while timing."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

NOTE = (
    "On the CPU 'launches' is null and 'operator calls' counts calls of torch operators, views included; 'host reads' "
    "are then operators that give Python a value or a shape that depends on values, which fastsam's CPU twin does "
    "freely, since nothing has to be waited for there. On a GPU 'launches' are kernels, copies and fills, and 'host "
    "reads' are warnings of torch.cuda.set_sync_debug_mode."
)
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2"}
_SYNC = "called a synchronizing CUDA operation"


class Operators(TorchDispatchMode):
    """Counts operator calls, and those from which the host learns a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func._schema.name.removeprefix("aten::")
        self.reads += name in _READS or (name == "index" and any(_is_mask(index) for index in args[1]))
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def count(run: Callable[[], None], steps: int, model: nn.Module, rows: int, device: str, regime: str) -> dict[str, Any]:
    """Return what one step does, as a mean over `steps`, each of which `run` takes."""
    found: dict[str, Any] = dict.fromkeys(("passes", "launches", "operator calls", "host reads"))

    def all_steps() -> None:
        for _ in range(steps):
            run()

    if not steps:
        return found
    if device == "cuda":
        found["host reads"] = round(_waits(all_steps) / steps, 2)
        found["launches"] = round((count_launches(all_steps, device) or 0) / steps, 2)
    elif regime != "compiled":  # compiled code passes the dispatcher by
        with Operators() as operators:
            all_steps()
        found["operator calls"], found["host reads"] = operators.calls / steps, operators.reads / steps
    if regime == "eager":  # compiled and captured models call no hooks
        with _passes(model) as passes:
            all_steps()
        units = {"weight gradients": len(list(model.parameters()))}
        found["passes"] = {what: round(n / steps / units.get(what, rows), 3) for what, n in passes.items()}
    return found


@contextmanager
def _passes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count rows through the model and gradients of weights."""
    seen = {"forward rows": 0, "forward rows without graph": 0, "backward rows": 0, "weight gradients": 0}

    def forward(module: nn.Module, args: Any, out: Tensor) -> None:
        seen["forward rows"] += len(out)
        if out.requires_grad:
            out.register_hook(backward)
        else:
            seen["forward rows without graph"] += len(out)

    def backward(grad: Tensor) -> None:
        seen["backward rows"] += len(grad)

    def accumulated(p: Tensor) -> None:
        seen["weight gradients"] += 1

    handles: list[Any] = [model.register_forward_hook(forward)]
    handles += [p.register_post_accumulate_grad_hook(accumulated) for p in model.parameters()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _waits(run: Callable[[], None]) -> int:
    """Return how often the host waited for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(_SYNC in str(warning.message) for warning in caught)


def count_launches(run: Callable[[], Any], device: str) -> int | None:
    """Return how many kernels, copies and fills a call runs on the device."""
    if device == "cpu":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in seen.events())
