"""The data sets that the command line knows, their splits, and label noise."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TEST_SHARE = 0.3
HELD_OUT_SHARE = 0.1
SCORED_ON = ("test", "held_out")


def generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose, so that no two purposes of a run share their random numbers."""
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Pictures(NamedTuple):
    """Float32 pictures in [0, 1] of shape [n, channels, height, width] and their int64 labels of shape [n]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def digits(split_seed: int) -> Pictures:
    """Return scikit-learn's 1797 real handwritten digits of 8x8 pixels, 30 % of each class for the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=TEST_SHARE, stratify=y, random_state=split_seed)
    # pixels are whole numbers from 0 to 16, so this is exact
    train_x, test_x = (torch.from_numpy(part).float().div(16).reshape(-1, 1, 8, 8) for part in parts[:2])
    train_y, test_y = (torch.from_numpy(part).long() for part in parts[2:])
    return Pictures(train_x, train_y, test_x, test_y, classes=10)


@dataclass(frozen=True)
class DataSet:
    """An entry of the table: one line for `--help`, and `load(split_seed)`."""

    summary: str
    load: Callable[[int], Pictures]


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet("1797 handwritten digits, 8x8 pixels, shipped with scikit-learn", digits),
}


def with_label_noise(y: Tensor, rate: float, classes: int, random: torch.Generator) -> Tensor:
    """Replace each label, with probability `rate`, by a class drawn uniformly from all classes.

    A drawn class may be the label's own, so on ten classes a tenth of the replaced ones keep theirs.

    Args:
        y: int64 labels of shape [n], left as they are.
        rate: probability from 0 to 1.
        classes: number of classes.
        random: CPU generator of the draws.

    Returns:
        int64 labels of shape [n].
    """
    replaced = torch.rand(len(y), generator=random) < rate
    return torch.where(replaced, torch.randint(classes, (len(y),), generator=random), y)


class Split(NamedTuple):
    """What a run trains on, and what its accuracy is measured on."""

    x: Tensor
    y: Tensor
    score_x: Tensor
    score_y: Tensor
    classes: int


def load(
    name: str, *, seed: int, split_seed: int, label_noise: float, scored_on: str, device: torch.device | str
) -> Split:
    """Load a data set onto a device.

    Args:
        name: a key of `DATA_SETS`.
        seed: of the label noise.
        split_seed: of the test split and of the held-out part.
        label_noise: share of training labels that are redrawn, 0 to 1; test labels stay clean.
        scored_on: "test": train on the whole training set and score on the test set. "held_out": leave a random 10 %
            of the training set out and score on it, noisy labels and all; the test set is dropped unseen.
        device: where the whole set lives.

    Returns:
        Float32 pictures of shape [n, channels, height, width], int64 labels of shape [n].
    """
    pictures = DATA_SETS[name].load(split_seed)
    noisy = with_label_noise(pictures.train_y, label_noise, pictures.classes, generator(seed, "label noise"))
    x, y, score_x, score_y = pictures.train_x, noisy, pictures.test_x, pictures.test_y
    if scored_on == "held_out":
        order = torch.randperm(len(x), generator=generator(split_seed, "held-out part"))
        held, rest = order.tensor_split([round(HELD_OUT_SHARE * len(x))])
        x, y, score_x, score_y = x[rest], noisy[rest], x[held], noisy[held]
    return Split(x.to(device), y.to(device), score_x.to(device), score_y.to(device), pictures.classes)
