"""A mode in which a test finds out that an operator waits for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Raises when an operator reads a device's value on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a host sync"
        return func(*args, **(kwargs or {}))
