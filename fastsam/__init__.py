"""fastsam: sharpness-aware training for PyTorch, exact and drop-in. (Not Segment Anything.)

`SAM` is a `torch.optim.Optimizer` around a base optimizer; see its docstring and the README.
"""

from importlib.metadata import PackageNotFoundError, version

from fastsam.esam import ESAM
from fastsam.kernels.dispatch import set_backend
from fastsam.msam import MSAM
from fastsam.sam import SAM

try:
    __version__ = version("fastsam")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["ESAM", "MSAM", "SAM", "set_backend"]
