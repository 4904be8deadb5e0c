"""fastsam: sharpness-aware training for PyTorch, exact and drop-in. (Not Segment Anything.)

`SAM`, `ESAM`, `MSAM`, `GSAM` and `LookSAM` are `torch.optim.Optimizer`s around a base optimizer, `SAF` and
`MESA` losses for any optimizer, and `graph_step` takes whole steps as CUDA graphs; see their docstrings and the README.
A method of your own derives from `TwoPassOptimizer`. `presets` has the papers' settings.
"""

from fastsam import presets as presets
from fastsam.esam import ESAM
from fastsam.graph.graph_step import GraphStep, graph_step
from fastsam.gsam import GSAM
from fastsam.installation import installed_version, warn_if_shared
from fastsam.kernels.ops import set_backend
from fastsam.looksam import LookSAM
from fastsam.mesa import MESA
from fastsam.msam import MSAM
from fastsam.norm_layers import norm_layer_groups
from fastsam.saf import SAF
from fastsam.sam import SAM
from fastsam.trajectory.samples import IndexedDataset, SampleToRankSampler
from fastsam.two_pass.batch import whole
from fastsam.two_pass.losses import Weighted
from fastsam.two_pass.optimizer import TwoPassOptimizer

__version__ = installed_version()
warn_if_shared(__file__)

__all__ = [
    "ESAM",
    "GSAM",
    "MESA",
    "MSAM",
    "SAF",
    "SAM",
    "GraphStep",
    "IndexedDataset",
    "LookSAM",
    "SampleToRankSampler",
    "TwoPassOptimizer",
    "Weighted",
    "graph_step",
    "norm_layer_groups",
    "set_backend",
    "whole",
]
