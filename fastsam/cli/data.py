"""The data sets that the command line knows, their splits, label noise, and how pictures become a model's inputs.

A set lives on the device whole. Pictures of bytes stay bytes there; a batch of them becomes, in this order,

    crop       h x w pixels of the picture with 4 rows and columns of zeros on each side, at a uniformly drawn place
    flip       left to right, with probability 1/2
    normalise  (x / 255 - mean) / std, for each colour

which is torchvision's RandomCrop(padding=4), RandomHorizontalFlip, ToTensor, Normalize. Pictures that are scored are
normalised alone. Float pictures, the digits, are taken as they are.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsam.cli import cifar, own_data
from fastsam.cli.cifar import Cifar
from fastsam.cli.errors import InputError

PADDING = 4
TEST_SHARE = 0.3
HELD_OUT_SHARE = 0.1
SCORED_ON = {"test": "test", "held_out": "held-out"}
"""What a run's accuracy is measured on, and what the reports call it."""


def generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for one purpose, so that no two purposes of a run share their random numbers.

    Args:
        seed: any integer.
        purpose: a text that says what is drawn.
    """
    digest = hashlib.sha256(f"{purpose} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Pictures(NamedTuple):
    """Pictures of shape [n, channels, height, width] and their int64 labels of shape [n].

    Either float32 in [0, 1], taken as they are, or uint8 with the mean and deviation of each channel of x / 255, which
    are augmented and normalised.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def digits(argument: str, split_seed: int) -> Pictures:
    """Return scikit-learn's 1797 real handwritten digits of 8x8 pixels, 30 % of each class for the test set.

    Args:
        argument: not used.
        split_seed: of the choice of the test set.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=TEST_SHARE, stratify=y, random_state=split_seed)
    # pixels are whole numbers from 0 to 16, so this is exact
    train_x, test_x = (torch.from_numpy(part).float().div(16).reshape(-1, 1, 8, 8) for part in parts[:2])
    train_y, test_y = (torch.from_numpy(part).long() for part in parts[2:])
    return Pictures(train_x, train_y, test_x, test_y, classes=10)


def read_cifar(data_set: Cifar, directory: str) -> Pictures:
    """Return CIFAR-10 or CIFAR-100 from its unpacked archive; its test set is its own.

    Args:
        data_set: which of them.
        directory: the folder that the archive unpacks to, or its parent.

    Raises:
        InputError: it is not there, or broken.
    """
    train, test = cifar.read(data_set, Path(directory))
    train_x, train_y, test_x, test_y = map(torch.from_numpy, (*train, *test))
    return Pictures(train_x, train_y, test_x, test_y, data_set.classes, data_set.mean, data_set.std)


def fake(shape: str, split_seed: int) -> Pictures:
    """Return pictures and labels of 10 classes drawn uniformly, a fifth as many to test on; for benchmarks.

    Args:
        shape: "NxCxHxW", with N pictures to train on.
        split_seed: of pictures and labels.

    Raises:
        InputError: they do not fit into memory.
    """
    n, *size = map(int, shape.split("x"))
    random = generator(split_seed, "fake pictures")
    try:
        x = torch.randint(256, (n + n // 5, *size), dtype=torch.uint8, generator=random)
    except (RuntimeError, TypeError) as error:
        # too many bytes, or too large a number
        raise InputError(f"fake:{shape} does not fit into memory; ask for less") from error
    y = torch.randint(10, (len(x),), generator=random)
    # of a uniform distribution from 0 to 1
    mean, std = (0.5,) * size[0], (3**-0.5 / 2,) * size[0]
    return Pictures(x[:n], y[:n], x[n:], y[n:], 10, mean, std)


def own_pictures(parts: Sequence[own_data.Arrays], split_seed: int) -> Pictures:
    """Return pictures of one's own; without a test set 30 % of each class are it.

    Args:
        parts: the training set and the test set, or all pictures.
        split_seed: of the choice of the test set.

    Raises:
        InputError: a class is too small to be split.
    """
    from sklearn.model_selection import train_test_split

    classes = own_data.classes_of(parts)
    (x, y), *tests = parts
    if not tests:
        rows = np.arange(len(x))
        try:
            train, test = train_test_split(rows, test_size=TEST_SHARE, stratify=y, random_state=split_seed)
        except ValueError as error:
            raise InputError(f"{TEST_SHARE:.0%} of each class are to be tested on: {error}") from error
        (x, y), tests = (x[train], y[train]), [(x[test], y[test])]
    train_x, train_y, test_x, test_y = map(torch.from_numpy, (x, y, *tests[0]))
    if train_x.dtype == torch.float32:
        return Pictures(train_x, train_y, test_x, test_y, classes)
    mean, std = _moments(train_x)
    return Pictures(train_x, train_y, test_x, test_y, classes, mean, std)


def _moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of x / 255, from exact sums over the bytes."""
    pixels = x.transpose(0, 1).flatten(1)
    count = torch.stack([torch.bincount(channel, minlength=256) for channel in pixels]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    n = pixels.shape[1]
    mean = count @ values / n
    std = (count @ values.square() / n - mean.square()).clamp(min=0).sqrt()
    # a channel of one value is moved to 0 and not divided by it
    return tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist())


def _needs(argument: str, what: str) -> Path:
    if not argument:
        raise InputError(f"a path is needed after the colon: {what}")
    return Path(argument).expanduser()


def _check_fake(argument: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", argument) or int(argument.partition("x")[0]) < 10:
        raise InputError(f"fake:{argument} is not fake:NxCxHxW with N of at least 10, such as fake:512x3x32x32")
    return argument


def _find_cifar(data_set: Cifar, directory: str) -> str:
    if not directory:
        raise InputError(f"{data_set.name} needs a directory after the colon; {cifar.remedy(data_set)}")
    return str(cifar.find(data_set, Path(directory).expanduser()).resolve())


@dataclass(frozen=True)
class DataSet:
    """An entry of the table.

    Args:
        summary: one line for `--help`.
        load: `load(argument, split_seed)`, where the argument is what follows the colon in `name:argument`.
        argument: what that is, for `--help`; empty for nothing.
        resolve: returns an argument in full, or raises InputError if there is no such data, and reads none of it.
    """

    summary: str
    load: Callable[[str, int], Pictures]
    argument: str = ""
    resolve: Callable[[str], str] = str


def _cifar_entry(data_set: Cifar, pictures: str) -> DataSet:
    return DataSet(
        f"{pictures}; DIR: its unpacked binary archive, or what that lies in",
        lambda argument, split_seed: read_cifar(data_set, argument),
        "DIR",
        lambda argument: _find_cifar(data_set, argument),
    )


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet("1797 handwritten digits, 8x8 pixels, shipped with scikit-learn", digits),
    "cifar10": _cifar_entry(cifar.CIFAR10, "60,000 photographs of 10 classes, 3x32x32, cropped and flipped at random"),
    "cifar100": _cifar_entry(cifar.CIFAR100, "the same in 100 classes"),
    "folder": DataSet(
        "pictures of your own: DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or DIR/CLASS/*.png",
        lambda argument, split_seed: own_pictures(own_data.read_folder(Path(argument)), split_seed),
        "DIR",
        lambda argument: str(own_data.find_folder(_needs(argument, "folder:DIR"))),
    ),
    "npz": DataSet(
        "arrays x_train, y_train, x_test, y_test of your own, as np.savez writes them",
        lambda argument, split_seed: own_pictures(own_data.read_arrays(Path(argument)), split_seed),
        "FILE",
        lambda argument: str(own_data.find_arrays(_needs(argument, "npz:FILE"))),
    ),
    "fake": DataSet(
        "N random pictures of C channels and HxW pixels, treated like CIFAR's, for timing",
        fake,
        "NxCxHxW",
        _check_fake,
    ),
}


def resolve(data: str) -> str:
    """Return `name:argument` in full, the same for every spelling of a directory.

    Raises:
        InputError: there is no such data; nothing of it has been read yet.
    """
    name, _, argument = data.partition(":")
    if name not in DATA_SETS:
        known = ", ".join(spelling(name) for name in DATA_SETS)
        raise InputError(f"unknown data set {name!r}; known are {known}")
    if argument and not DATA_SETS[name].argument:
        raise InputError(f"{name} takes no argument, got {argument!r}; use --data {name}")
    argument = DATA_SETS[name].resolve(argument)
    return f"{name}:{argument}" if argument else name


def spelling(name: str) -> str:
    """Return how a data set is asked for: its name, and what follows."""
    argument = DATA_SETS[name].argument
    return f"{name}:{argument}" if argument else name


def short(data: str) -> str:
    """Return `name:argument` without the directories on the way to the argument, for titles."""
    name, colon, argument = data.partition(":")
    return name + colon + Path(argument).name


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


def draw_moves(n: int, random: torch.Generator) -> Tensor:
    """Draw how n pictures are cropped and flipped.

    Args:
        n: number of pictures.
        random: CPU generator of the draws, which are thus the same for every device.

    Returns:
        int64 of shape [n, 3]: rows and columns to skip, 0 to 8 of the padded picture, and 1 for a flip, else 0.
    """
    skip = torch.randint(2 * PADDING + 1, (n, 2), generator=random)
    return torch.cat([skip, torch.randint(2, (n, 1), generator=random)], dim=1)


def crop_and_flip(x: Tensor, moves: Tensor) -> Tensor:
    """Return pictures of the same shape and type, each cropped from its zero-padded self and perhaps flipped.

    Args:
        x: [n, channels, height, width].
        moves: what `draw_moves` drew, shape [n, 3], on the same device.
    """
    n, channels, height, width = x.shape
    # [n, 1] each
    top, left, flip = moves[:, :, None].unbind(1)
    rows = top + torch.arange(height, device=x.device)
    across = torch.arange(width, device=x.device)
    columns = left + torch.where(flip == 1, across.flip(0), across)
    # [n, height, width]
    pixels = rows[:, :, None] * (width + 2 * PADDING) + columns[:, None]
    padded = F.pad(x, (PADDING,) * 4).flatten(2)
    return padded.gather(2, pixels.flatten(1)[:, None].expand(n, channels, -1)).view(x.shape)


class Split(NamedTuple):
    """What a run trains on, and what its accuracy is measured on.

    `mean` and `std` have shape [channels, 1, 1], or are None for pictures that are taken as they are.
    """

    x: Tensor
    y: Tensor
    score_x: Tensor
    score_y: Tensor
    classes: int
    mean: Tensor | None
    std: Tensor | None

    def augmented(self, samples: Tensor, moves: Tensor) -> Tensor:
        """Return the inputs for a training step, float32 of shape [n, channels, height, width].

        Args:
            samples: int64 indices into `x`, shape [n].
            moves: how each is cropped and flipped, shape [n, 3].
        """
        x = self.x[samples]
        return x if self.mean is None else self.normalised(crop_and_flip(x, moves))

    def normalised(self, x: Tensor) -> Tensor:
        """Return stored pictures as float32 inputs of the same shape, with no augmentation."""
        return x if self.mean is None or self.std is None else x.float().div_(255).sub_(self.mean).div_(self.std)


def load(
    data: str, *, seed: int, split_seed: int, label_noise: float, scored_on: str, device: torch.device | str
) -> Split:
    """Load a data set onto a device.

    Args:
        data: a key of `DATA_SETS`, with a colon and its argument where it has one.
        seed: of the label noise.
        split_seed: of the test split, where the set has none of its own, and of the held-out part.
        label_noise: share of training labels that are redrawn, 0 to 1; test labels stay clean.
        scored_on: "test": train on the whole training set and score on the test set. "held_out": leave a random 10 %
            of the training set out and score on it, noisy labels and all; the test set is dropped unseen.
        device: where the whole set lives.

    Raises:
        InputError: the data cannot be read.
    """
    name, _, argument = data.partition(":")
    pictures = DATA_SETS[name].load(argument, split_seed)
    noisy = with_label_noise(pictures.train_y, label_noise, pictures.classes, generator(seed, "label noise"))
    x, y, score_x, score_y = pictures.train_x, noisy, pictures.test_x, pictures.test_y
    if scored_on == "held_out":
        order = torch.randperm(len(x), generator=generator(split_seed, "held-out part"))
        held, rest = order.tensor_split([round(HELD_OUT_SHARE * len(x))])
        x, y, score_x, score_y = x[rest], noisy[rest], x[held], noisy[held]
    x, y, score_x, score_y = (tensor.to(device) for tensor in (x, y, score_x, score_y))
    mean, std = (torch.tensor(v, device=device)[:, None, None] if v else None for v in (pictures.mean, pictures.std))
    return Split(x, y, score_x, score_y, pictures.classes, mean, std)
