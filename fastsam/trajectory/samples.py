"""Sample ids: which sample a row of a batch is, and, with several processes, which of them always meets it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Dataset, Sampler


class IndexedDataset(Dataset):
    """A dataset whose items carry their index: `(*item, index)` of a tuple item, `(item, index)` of any other.

    Args:
        dataset: a map-style dataset: it has `__getitem__` and `__len__`.

    Raises:
        TypeError: the dataset has no length or cannot be indexed, so its samples have no ids.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            kind = type(dataset).__name__
            raise TypeError(f"{kind} cannot be indexed, so its samples have no ids; use a map-style dataset")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.dataset[index]
        return (*item, index) if isinstance(item, tuple) else (item, index)

    def __getattr__(self, name: str) -> Any:
        # While it is being unpickled there is no dataset yet.
        if name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SampleToRankSampler(Sampler[int]):
    """A distributed sampler that gives every sample to the same rank in every epoch: sample i to rank i mod W.

    `SAF(..., sampler=sampler)` then keeps on each rank the history of that rank's samples alone. Unlike with torch's
    DistributedSampler samples do not move between ranks, only within one. Every rank yields equally many.

    Args:
        num_samples: size of the dataset, at least W.
        num_replicas: number of ranks W. Default: that of the default process group.
        rank: this process. Default: that of the default process group.
        shuffle: draw a new order in every epoch; call `set_epoch`.
        seed: of the order, equal on all ranks.
        drop_last: where ranks have unequal numbers of samples, leave out one that the epoch draws. Default: repeat
            one on the ranks that have fewer.

    Raises:
        ValueError: numbers that cannot be, or fewer samples than ranks.
        RuntimeError: num_replicas or rank is not given, and there is no process group.
    """

    def __init__(
        self,
        num_samples: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if (num_replicas is None or rank is None) and not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("there is no process group; call init_process_group, or give num_replicas and rank")
        self.num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
        self.rank = dist.get_rank() if rank is None else rank
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank must be in [0, {self.num_replicas}), got {self.rank}")
        if num_samples < self.num_replicas:
            raise ValueError(f"{num_samples} samples are fewer than the {self.num_replicas} ranks")
        self.num_samples, self.shuffle, self.seed, self.drop_last = num_samples, shuffle, seed, drop_last
        self.epoch = 0

    @property
    def num_own_samples(self) -> int:
        """Number of samples that belong to this rank."""
        return len(range(self.rank, self.num_samples, self.num_replicas))

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.num_samples, self.num_replicas)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[int]:
        own = np.arange(self.rank, self.num_samples, self.num_replicas)
        # Every rank draws an order of its own, or the same samples of all ranks would always share a batch.
        if self.shuffle:
            own = np.random.default_rng((self.seed, self.epoch, self.rank)).permutation(own)
        return iter(np.resize(own, len(self)).tolist())
