"""Sample ids: which sample a row of a batch is, and, with several processes, which of them always meets it."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset, Sampler

from fastsam.arguments import LARGEST_INTEGER, check_flag, check_integer

SAMPLE_ID = "sample_id"
"""Key of the id in items that are mappings."""


class IndexedDataset(Dataset):
    """A dataset whose items carry their index: `(*item, index)` of a tuple item, `(item, index)` of any other.

    An item that is a mapping, as Hugging Face's datasets yield, also gets it as its key "sample_id", which reaches
    collators and models that know dictionaries alone. Datasets that hand out whole batches (`__getitems__`, as
    `torch.utils.data.Subset` and `random_split`) do so here. Attributes are the dataset's.

    Args:
        dataset: a map-style dataset: it has `__getitem__` and `__len__`. Ids count its own items: those of a Subset are
            positions in the Subset.

    Raises:
        TypeError: the dataset has no length, cannot be indexed or is an `IterableDataset`, so its samples have no ids.
        ValueError: from an item that has a key "sample_id" already.
    """

    def __init__(self, dataset: Any) -> None:
        lacks = not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__")
        if lacks or isinstance(dataset, IterableDataset):
            kind = type(dataset).__name__
            raise TypeError(f"{kind} cannot be indexed, so its samples have no ids; use a map-style dataset")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._with_id(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """Return the items of a batch, as DataLoader asks for them."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        return [self._with_id(item, index) for item, index in zip(items, indices, strict=True)]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (self[index] for index in range(len(self)))

    def _with_id(self, item: Any, index: Any) -> tuple[Any, ...]:
        number = operator.index(index)
        number += len(self) if number < 0 else 0
        if isinstance(item, tuple):
            return (*item, number)
        if isinstance(item, Mapping):
            if SAMPLE_ID in item:
                raise ValueError(
                    f"an item has a key {SAMPLE_ID!r} already; rename it, since it stands for the sample's id"
                )
            item = {**item, SAMPLE_ID: number}
        return item, number

    def __getattr__(self, name: str) -> Any:
        # Special methods are this class's own: the dataset's would copy or pickle the dataset alone. While it is being
        # unpickled there is no dataset yet.
        if name == "dataset" or (name.startswith("__") and name.endswith("__")):
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
        TypeError: an argument of the wrong type.
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
        for name, flag in (("shuffle", shuffle), ("drop_last", drop_last)):
            check_flag(name, flag)
        check_integer("num_samples", num_samples, 1, LARGEST_INTEGER)
        check_integer("seed", seed, 0)
        for name, number, smallest in (("num_replicas", num_replicas, 1), ("rank", rank, 0)):
            if number is not None:
                check_integer(name, number, smallest)
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
