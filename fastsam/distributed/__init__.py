"""Several processes: ranks that hold copies of one model, and ranks that hold shards of its weights."""

from fastsam.distributed.ddp import PerturbSync

__all__ = ["PerturbSync"]
