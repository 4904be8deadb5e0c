"""Launches of the Triton kernels: what they are told, on which device they run, and who may watch them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastsam.kernels.calls import Call, run_all
from fastsam.kernels.launch_tables import INTERPRETED, Launch, Work, lend_counters
from fastsam.kernels.philox import Draw
from fastsam.kernels.philox_triton import signed
from fastsam.kernels.tensor_list import buckets

THREADS = 256
"""Threads of a program, whatever the width of a warp."""
# Of the widest tensor: with two 128-bit accesses a thread, a kernel needs about 40 registers.
_BYTES_PER_PROGRAM = 8192
# Most of what the interpreter runs are small models, and a program there computes whole blocks.
_INTERPRETED_BLOCK_SIZE = 4096


def block_size(*dtypes: torch.dtype, vectors: int = 2) -> int:
    """Return the elements of a chunk.

    Args:
        dtypes: of the tensors that a kernel walks side by side.
        vectors: how many 128-bit accesses each thread makes to the widest of them.
    """
    if INTERPRETED:
        return _INTERPRETED_BLOCK_SIZE
    return _BYTES_PER_PROGRAM * vectors // 2 // max(dtype.itemsize for dtype in dtypes)


def widest(dtypes: Sequence[torch.dtype]) -> int:
    """Bits of the widest dtype."""
    return 8 * max(dtype.itemsize for dtype in dtypes)


def wide(dtype: torch.dtype) -> Any:
    """What a kernel computes in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def t_of(eta: float | None) -> tuple[float, float]:
    """Two hyperparameters that say what T is: (0, 0) for 1, (1, eta) for |w| + eta."""
    return (0.0, 0.0) if eta is None else (1.0, eta)


def mask_constants(draw: Draw | None) -> dict[str, bool]:
    """Return what a kernel with a random mask is compiled for: whether it is of elements, or of the whole tensor."""
    is_masked = draw is not None and draw.keep_probability is not None
    return {"MASKED": is_masked and not draw.whole, "WHOLE": is_masked and draw.whole}  # type: ignore[union-attr]


def random_arguments(draw: Draw | None) -> tuple[int, int, int]:
    """Return the step and the two halves of the seed as kernels take them; zeros where nothing is drawn."""
    return (0, 0, 0) if draw is None else (signed(draw.step), signed(draw.seed), signed(draw.seed >> 32))


def random_columns(draw: Draw | None, each: Launch) -> tuple[tuple[int, ...], ...]:
    """Return the index and the first element of each tensor, which address its random numbers; else zeros."""
    zeros = (0,) * len(each.positions)
    return (zeros, zeros) if draw is None else tuple(map(each.of, draw.addresses()))


def to_device(scalar: Tensor | None, device: torch.device, dtype: torch.dtype | None = None) -> Tensor | None:
    """Return a 0-dim tensor on `device` without waiting for it; None stays None."""
    return None if scalar is None else scalar.to(device, dtype, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager:
    """Context in which a launch goes to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def by_device(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Return the launches in one list for each device."""
    return [[launches[i] for i in positions] for positions in buckets(each.device for each in launches)]


def launch_lists(kernel: Any, launches: Sequence[Launch], work_of: Callable[[Launch], Work]) -> None:
    """Run a kernel over lists of tensors; see `launch_calls`."""
    run_all(launch_calls(kernel, launches, work_of))


def launch_calls(kernel: Any, launches: Sequence[Launch], work_of: Callable[[Launch], Work]) -> list[Call]:
    """Return the calls that run a kernel over lists of tensors: a launch for each device and combination of dtypes.

    Args:
        kernel: a jit function, whose arguments are those of `Table`, counters if it is lent any, and the work's own.
        launches: what `split` returned.
        work_of: returns what the kernel is told in a launch.
    """
    calls: list[Call] = []
    for each in launches:
        work = work_of(each)
        table = each.table(work)
        arguments = [to_device(x, each.device) if isinstance(x, Tensor) and not x.dim() else x for x in work.arguments]
        zeros, give_back = lend_counters(work.n_counters, each.device) if work.n_counters else (None, None)
        before = table.arguments() if zeros is None else (*table.arguments(), zeros)
        call = call_of(kernel, len(table.chunks), *before, *arguments, **work.constants)
        calls += [call] if is_current(each.device) else _elsewhere(each.device, call)
        if give_back is not None:
            calls.append(give_back)
    return calls


def is_current(device: torch.device) -> bool:
    """Whether a launch goes to `device` by itself."""
    return device.type != "cuda" or torch.cuda.current_device() == device.index


def _elsewhere(device: torch.device, call: Call) -> list[Call]:
    """Return the calls that run one on another device than the current one."""
    context = on_device(device)
    return [partial(context.__enter__), call, partial(context.__exit__, None, None, None)]


_observer: Callable[..., None] | None = None


@contextmanager
def observed_by(observer: Callable[..., None]) -> Iterator[None]:
    """Context in which every launch is handed to `observer`, as `launch` was given it, instead of being run.

    Args:
        observer: takes the arguments of `launch`, and may call `run` with them.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def launch(kernel: Any, n_programs: int, *args: Any, **constants: Any) -> None:
    """Run a kernel as `run` does, or hand it to the observer."""
    call_of(kernel, n_programs, *args, **constants)()


def call_of(kernel: Any, n_programs: int, *args: Any, **constants: Any) -> Call:
    """Return the call that does what `launch` does."""
    if _observer is not None:
        return partial(_observer, kernel, n_programs, *args, **constants)
    return _call(kernel, n_programs, *args, **constants)


def run(kernel: Any, n_programs: int, *args: Any, **constants: Any) -> None:
    """Run `n_programs` programs of a kernel on the current device; none where there is nothing to do.

    Args:
        kernel: a jit function.
        n_programs: size of the grid.
        args: the kernel's arguments.
        constants: what the kernel is compiled for, and `threads` of a program; `enable_fp_fusion` says whether a
            product and a sum may become one operation with one rounding.
    """
    _call(kernel, n_programs, *args, **constants)()


def _call(
    kernel: Any, n_programs: int, *args: Any, threads: int = THREADS, enable_fp_fusion: bool = True, **constants: Any
) -> Call:
    if not n_programs:
        return partial(tuple)
    num_warps = max(1, threads // (64 if torch.version.hip else 32))
    return partial(kernel[(n_programs,)], *args, num_warps=num_warps, enable_fp_fusion=enable_fp_fusion, **constants)
