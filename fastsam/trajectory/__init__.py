"""What the trajectory losses SAF and MESA stand on: the loss, the history of outputs, and ids of samples."""

from fastsam.trajectory.samples import IndexedDataset, SampleToRankSampler

__all__ = ["IndexedDataset", "SampleToRankSampler"]
