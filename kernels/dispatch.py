"""The one place that picks an implementation of the launchers."""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from fastsam.kernels import reference

BACKENDS = ("triton", "torch")
_chosen: str | None = None


def set_backend(name: str | None) -> None:
    """Choose the implementation of the fused work for every optimizer of this process.

    Args:
        name: "torch" for the plain-torch twins, "triton" for the Triton kernels, None for the default: Triton where
            it can run on the tensors at hand, else torch.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}, or None")
    if name == "triton":
        raise RuntimeError("backend 'triton' cannot run: this version has no Triton kernels yet; use 'torch' or None")
    _chosen = name


def pick(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the module whose launchers serve these tensors."""
    return reference
