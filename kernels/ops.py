"""The one place that picks an implementation of the launchers."""

import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastsam.kernels import reference

BACKENDS = ("triton", "torch")
_chosen: str | None = None
_is_interpreting = "TRITON_INTERPRET" in os.environ  # to look there takes longer than all the rest of `pick`


def set_backend(name: str | None) -> None:
    """Choose the implementation of the fused work for every optimizer of this process.

    Args:
        name: "torch" for the reference implementations, "triton" for the Triton kernels, None for the default: Triton
            where it can run on the tensors at hand, else torch. Tensors on the CPU are left to torch in any case,
            unless Triton interprets its kernels.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}, or None")
    if name == "triton":
        kernels = _triton_backend()
        if kernels is None:
            raise RuntimeError("backend 'triton' cannot run: triton is not installed; use 'torch' or None")
        if not kernels.INTERPRETED and not _has_gpu():
            raise RuntimeError(
                "backend 'triton' cannot run: no GPU with a driver that Triton knows; use 'torch' or None, or set "
                "TRITON_INTERPRET=1 before fastsam is imported to interpret the kernels on the CPU"
            )
    _chosen = name


def pick(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module whose launchers serve these tensors; they split a list over devices themselves.

    Raises:
        RuntimeError: tensors on a GPU while Triton interprets its kernels, which would read the GPU's addresses here.
    """
    if _chosen == "torch":
        return reference
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is None and (not tensors or (_chosen is None and not _is_interpreting)):
        return reference
    kernels = _triton_backend()
    if kernels is None:
        return reference
    if kernels.INTERPRETED:
        if device is not None:
            raise RuntimeError(
                f"a tensor is on {device}, but Triton interprets its kernels, which only works on the CPU; unset "
                "TRITON_INTERPRET before fastsam is imported, or call set_backend('torch')"
            )
        return kernels
    if device is None or (_chosen is None and not _is_supported(device)):
        return reference
    return kernels


@cache
def _triton_backend() -> ModuleType | None:
    """The Triton launchers; None without triton. Imported on first use, since importing fastsam must not need it."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from fastsam.kernels import triton_backend

    return triton_backend


def _has_gpu() -> bool:
    from triton.backends import backends

    return any(backend.driver.is_active() for backend in backends.values())


@cache
def _is_supported(device: torch.device) -> bool:
    """Whether Triton compiles for this GPU: AMD's, and NVIDIA's from Ampere on."""
    return _has_gpu() and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0))
