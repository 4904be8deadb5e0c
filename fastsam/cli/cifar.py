"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html), read from the binary archives.

A record is the label, a byte (CIFAR-100: a coarse one, then the fine one that counts), and 3072 bytes: the red, green
and blue plane of 32x32 pixels, row by row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsam.cli.errors import InputError

PIXELS = 3 * 32 * 32
SITE = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class Cifar:
    """A data set, and its archive as it lies on the disk.

    Args:
        name: what its authors call it.
        classes: number of classes.
        mean: of each colour over the training set, of pixels from 0 to 1.
        std: likewise the standard deviation.
        archive: its name on the site.
        folder: what it unpacks to.
        train: files of the training set, in order.
        test: file of the test set.
        records: pictures in each training file; there are `test_records` in the test set's.
        label_bytes: those before a record's pixels, of which the last counts.
    """

    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    records: int
    label_bytes: int
    test_records: int = 10_000

    @property
    def files(self) -> dict[str, int]:
        """All files with the number of pictures in each."""
        return dict.fromkeys(self.train, self.records) | {self.test: self.test_records}

    def size(self, records: int) -> int:
        """Return the size in bytes of a file of so many pictures."""
        return records * (PIXELS + self.label_bytes)


CIFAR10 = Cifar(
    name="CIFAR-10",
    classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test="test_batch.bin",
    records=10_000,
    label_bytes=1,
)
CIFAR100 = Cifar(
    name="CIFAR-100",
    classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    records=50_000,
    label_bytes=2,
)


def find(data_set: Cifar, directory: Path) -> Path:
    """Return the folder that holds the data set, all files present and of the right size.

    Args:
        data_set: what to look for.
        directory: the folder that the archive unpacks to, or its parent.

    Raises:
        InputError: it is not there, there twice, or incomplete.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; {remedy(data_set)}")
    firsts = list(_candidates(data_set, directory))
    if not firsts:
        raise InputError(f"{directory} holds no {data_set.name}{_other(data_set, directory)}; {remedy(data_set)}")
    if len(firsts) > 1:
        raise InputError(
            f"{data_set.name} is there more than once, as {firsts[0]} and {firsts[1]}; "
            "name the folder of one, or remove the other's files"
        )
    folder = firsts[0].parent
    for name, records in data_set.files.items():
        _check_size(folder / name, data_set.size(records), data_set)
    return folder


def _candidates(data_set: Cifar, directory: Path) -> Iterator[Path]:
    """Yield the first file of the data set in each place where it may lie."""
    for folder in (directory, directory / data_set.folder):
        if files := [folder / name for name in data_set.files if (folder / name).is_file()]:
            yield files[0]


def remedy(data_set: Cifar) -> str:
    """Return where to get the data set and how to name it."""
    return f"unpack {data_set.archive} from {SITE} and name {data_set.folder}/, or what it lies in"


def _other(data_set: Cifar, directory: Path) -> str:
    other = CIFAR100 if data_set.name == CIFAR10.name else CIFAR10
    return f" but {other.name}" if any(_candidates(other, directory)) else ""


def _check_size(path: Path, wanted: int, data_set: Cifar) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing, a file of {data_set.name}; {_afresh(data_set)}")
    size = path.stat().st_size
    if size != wanted:
        raise InputError(f"{path} has {size:,} bytes where {data_set.name} has {wanted:,} bytes; {_afresh(data_set)}")


def _afresh(data_set: Cifar) -> str:
    return f"unpack {data_set.archive} from {SITE} afresh"


Arrays = tuple[np.ndarray, np.ndarray]
"""uint8 pictures of shape [n, 3, 32, 32] and int64 labels of shape [n]."""


def read(data_set: Cifar, directory: Path) -> tuple[Arrays, Arrays]:
    """Return the training set and the test set.

    Args:
        data_set: what to read.
        directory: the folder that the archive unpacks to, or its parent.

    Raises:
        InputError: what `find` refuses, or a file that cannot be read or holds an impossible label.
    """
    folder = find(data_set, directory)
    parts = [_read_file(folder / name, records, data_set) for name, records in data_set.files.items()]
    train_x, train_y = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return (train_x, train_y), parts[-1]


def _read_file(path: Path, records: int, data_set: Cifar) -> Arrays:
    labels = data_set.label_bytes
    try:
        content = np.fromfile(path, np.uint8).reshape(records, labels + PIXELS)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    y = content[:, labels - 1].astype(np.int64)
    if len(wrong := np.flatnonzero(y >= data_set.classes)):
        raise InputError(
            f"{path} is no file of {data_set.name}: picture {wrong[0]} has label {y[wrong[0]]}, beyond "
            f"{data_set.classes - 1}; {_afresh(data_set)}"
        )
    return content[:, labels:].reshape(-1, 3, 32, 32), y
