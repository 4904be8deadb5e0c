"""Ids of samples, whatever the dataset is."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from fastsam import IndexedDataset

PAIRS = TensorDataset(torch.arange(12.0)[:, None], torch.arange(12))


class Records(Dataset):
    """As Hugging Face's: items are dicts, and whole batches are fetched at once; copies itself in a way of its own."""

    fetched = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"y": torch.tensor(10 * index)}

    def __getitems__(self, indices):
        self.fetched += 1
        return [self[index] for index in indices]

    def __deepcopy__(self, memo):
        return Records()


SETS = {
    "plain": PAIRS,
    "random_split": random_split(PAIRS, [8, 4], generator=torch.Generator().manual_seed(0))[0],
    "subset": Subset(PAIRS, range(2, 12)),
    "concatenated": ConcatDataset([PAIRS, PAIRS]),
    "records": Records(),
    "part of records": Subset(Records(), range(3, 12)),
    "numbers": list(range(12)),
}
WAYS = {
    "as it is": lambda dataset: dataset,
    "deep-copied": copy.deepcopy,
    "pickled": lambda dataset: pickle.loads(pickle.dumps(dataset)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETS)
def test_ids_of_every_map_style_dataset(name, way):
    dataset = WAYS[way](IndexedDataset(SETS[name]))
    assert isinstance(dataset, IndexedDataset)
    for number, (*_, ids) in enumerate(DataLoader(dataset, batch_size=4)):
        assert ids.tolist() == list(range(len(dataset)))[4 * number : 4 * number + 4]
    assert [index for *_, index in dataset] == list(range(len(dataset)))
    assert [type(item) for item in dataset[0][:-1]] == [type(item) for item in dataset.__getitems__([0])[0][:-1]]
    assert dataset[-1][-1] == len(dataset) - 1


def test_records_carry_their_ids_and_are_fetched_at_once():
    dataset = IndexedDataset(Records())
    batch, ids = next(iter(DataLoader(dataset, batch_size=4, sampler=[5, 3, 11, 0])))
    assert batch["y"].tolist() == [50, 30, 110, 0]
    assert batch["sample_id"].tolist() == ids.tolist() == [5, 3, 11, 0]
    assert dataset.fetched == 1


def test_what_has_no_ids_is_refused():
    class Stream(IterableDataset):
        def __len__(self):
            return 12

        def __iter__(self):
            return iter(range(12))

    with pytest.raises(TypeError, match="Stream cannot be indexed"):
        IndexedDataset(Stream())
    with pytest.raises(ValueError, match="a key 'sample_id' already"):
        IndexedDataset([{"sample_id": 3}])[0]
