"""Processes of which nobody has said what they share: they may train copies of one model, or have nothing in common.

Each leaves notes in the process group's store, where the others find them. A collective would wait for ever where only
some of the processes train.
"""

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_built: Counter[str] = Counter()
LAST_LOOK = 1024
"""The step after which nobody looks for notes any more."""


class Peers:
    """What the processes of the default group have noted about optimizers of the same parameter shapes.

    Args:
        params: the optimizer's parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        shapes = hashlib.sha256(repr([tuple(p.shape) for p in params]).encode()).hexdigest()[:16]
        self._name = f"fastsam/{shapes}/{_built[shapes]}"
        _built[shapes] += 1
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._steps = 0

    def refuse_other_seeds(self, seed: int) -> None:
        """Raise ValueError if a process has noted another seed, which one of two that differ is sure to find."""
        for rank, other in self._exchange("seed", str(seed)).items():
            if other != str(seed):
                raise ValueError(other_seed(seed, f"rank {rank} has seed={other}"))

    def compare(self, grads: Sequence[Tensor | None]) -> bool:
        """Warn where another process had other final gradients in the first step; one wait for the device, then.

        Args:
            grads: those that the base optimizer is to step with.

        Returns:
            Whether there is nothing more to compare.
        """
        self._steps += 1
        if self._steps == 1:
            self._norm = float(norm_of(grads, torch.device("cpu")))
        elif self._steps & (self._steps - 1):
            return False
        notes = self._exchange("norm", repr(self._norm))
        for rank, note in notes.items():
            if math.isfinite(self._norm) and not math.isclose(self._norm, float(note), rel_tol=1e-4):
                warnings.warn(
                    f"the final gradients of the first step differ between ranks: their norm is {self._norm:.6g} on "
                    f"rank {dist.get_rank()} and {float(note):.6g} on rank {rank}. Unless every process trains a model "
                    "of its own, nobody reduces them and ranks drift apart: pass model=, the DistributedDataParallel "
                    "module, and call it in the loss",
                    stacklevel=7,
                )
                return True
        return len(notes) == dist.get_world_size() - 1 or self._steps >= LAST_LOOK

    def _exchange(self, what: str, note: str) -> dict[int, str]:
        """Leave a note, and return those of other ranks that have left theirs."""
        found: dict[int, str] = {}
        try:
            self._store.set(f"{self._name}/{what}/{dist.get_rank()}", note)
            for rank in range(dist.get_world_size()):
                key = f"{self._name}/{what}/{rank}"
                if rank != dist.get_rank() and self._store.check([key]):
                    found[rank] = self._store.get(key).decode()
        except RuntimeError:
            # The process that serves the store has ended, or there is no store: nobody is left to be compared with.
            self._steps = LAST_LOOK
        return found


def norm_of(grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the 2-norm over all gradients that are there, 0-dim float64 on `device`."""
    dense = [g.to_dense() if g.is_sparse else g for g in grads if g is not None]
    parts = [torch.linalg.vector_norm(g.abs(), dtype=torch.float64).to(device) for g in dense]
    return torch.stack([torch.zeros((), dtype=torch.float64, device=device), *parts]).norm()


def other_seed(seed: int, whose: str) -> str:
    """Return the text of the error about seeds that differ.

    Args:
        seed: this rank's.
        whose: what is known of the other.
    """
    return (
        f"seed={seed} on rank {dist.get_rank()}, but {whose}: ranks would perturb by other random numbers. Pass the "
        "same seed on all ranks, not the rank's own"
    )
