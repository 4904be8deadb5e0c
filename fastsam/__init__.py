"""fastsam: sharpness-aware training for PyTorch, exact and drop-in. (Not Segment Anything.)

`SAM`, `ESAM` and `MSAM` are `torch.optim.Optimizer`s around a base optimizer, `SAF` and `MESA` losses for any
optimizer, and `graph_step` takes whole steps as CUDA graphs; see their docstrings and the README.
"""

from fastsam.esam import ESAM
from fastsam.graph.graph_step import GraphStep, graph_step
from fastsam.installation import installed_version, warn_if_shared
from fastsam.kernels.ops import set_backend
from fastsam.mesa import MESA
from fastsam.msam import MSAM
from fastsam.saf import SAF
from fastsam.sam import SAM
from fastsam.trajectory.samples import IndexedDataset, SampleToRankSampler

__version__ = installed_version()
warn_if_shared(__file__)

__all__ = [
    "ESAM",
    "MESA",
    "MSAM",
    "SAF",
    "SAM",
    "GraphStep",
    "IndexedDataset",
    "SampleToRankSampler",
    "graph_step",
    "set_backend",
]
