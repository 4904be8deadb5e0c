"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html), read from either archive.

The binary archive's records are the label, a byte (CIFAR-100: a coarse one, then the fine one that counts), and 3072
bytes: the red, green and blue plane of 32x32 pixels, row by row. The Python archive has one dict per file, pickled by
Python 2, with the same 3072 bytes in each row of b"data".
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastsam.cli.errors import InputError

PIXELS = 3 * 32 * 32
SITE = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class Layout:
    """One archive as it lies on the disk.

    Args:
        archive: its name on the site.
        folder: what it unpacks to.
        train: files of the training set, in order.
        test: file of the test set.
        records: pictures in each training file; there are `test_records` in the test set's.
        label_bytes: those before a binary record's pixels, of which the last counts; 0 for pickles.
        label_key: where a pickle has its labels.
    """

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    records: int
    label_bytes: int = 0
    label_key: bytes = b""
    test_records: int = 10_000

    @property
    def files(self) -> dict[str, int]:
        """All files with the number of pictures in each."""
        return dict.fromkeys(self.train, self.records) | {self.test: self.test_records}

    def sizes(self, records: int) -> tuple[int, int]:
        """Return the smallest and largest size in bytes that a file of so many pictures can have."""
        if self.label_bytes:
            return (records * (PIXELS + self.label_bytes),) * 2
        return records * PIXELS, records * (PIXELS + 256) + 1024  # labels and file names beside the pixels


@dataclass(frozen=True)
class Cifar:
    """A data set: its number of classes, the training set's mean and deviation of each colour, and its layouts."""

    name: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layouts: tuple[Layout, ...]


_TEN_BINARY = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEN_PICKLED = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10 = Cifar(
    "CIFAR-10",
    10,
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    (
        Layout("cifar-10-binary.tar.gz", "cifar-10-batches-bin", _TEN_BINARY, "test_batch.bin", 10_000, 1),
        Layout("cifar-10-python.tar.gz", "cifar-10-batches-py", _TEN_PICKLED, "test_batch", 10_000, 0, b"labels"),
    ),
)
CIFAR100 = Cifar(
    "CIFAR-100",
    100,
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
    (
        Layout("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin", 50_000, 2),
        Layout("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", 50_000, 0, b"fine_labels"),
    ),
)


def find(data_set: Cifar, directory: Path) -> tuple[Path, Layout]:
    """Return the folder that holds the data set and how it lies there, all files present and of the right size.

    Args:
        data_set: what to look for.
        directory: the folder that an archive unpacks to, or its parent.

    Raises:
        InputError: nothing, several layouts, or an incomplete one is there.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; {remedy(data_set)}")
    found = list(_candidates(data_set, directory))
    if not found:
        raise InputError(f"{directory} holds no {data_set.name}{_other(data_set, directory)}; {remedy(data_set)}")
    if len(found) > 1:
        raise InputError(
            f"{data_set.name} is there more than once, as {found[0][0]} and {found[1][0]}; "
            "name the folder of one, or remove the other's files"
        )
    file, layout = found[0]
    folder = file.parent
    for name, records in layout.files.items():
        _check_size(folder / name, *layout.sizes(records), data_set, layout)
    return folder, layout


def _candidates(data_set: Cifar, directory: Path) -> Iterator[tuple[Path, Layout]]:
    """Yield the first file of each layout in each place where it may lie."""
    for layout in data_set.layouts:
        for folder in (directory, directory / layout.folder):
            if files := [folder / name for name in layout.files if (folder / name).is_file()]:
                yield files[0], layout


def remedy(data_set: Cifar) -> str:
    """Return where to get the data set and how to name it."""
    archives = " or ".join(layout.archive for layout in data_set.layouts)
    folders = " or ".join(f"{layout.folder}/" for layout in data_set.layouts)
    return f"unpack {archives} from {SITE} and name {folders}, or what it lies in"


def _other(data_set: Cifar, directory: Path) -> str:
    other = CIFAR100 if data_set.name == CIFAR10.name else CIFAR10
    return f" but {other.name}" if any(_candidates(other, directory)) else ""


def _check_size(path: Path, least: int, most: int, data_set: Cifar, layout: Layout) -> None:
    remedy = f"unpack {layout.archive} from {SITE} afresh"
    if not path.is_file():
        raise InputError(f"{path} is missing, a file of {data_set.name}; {remedy}")
    size = path.stat().st_size
    if not least <= size <= most:
        wanted = f"{least:,} bytes" if least == most else f"{least:,} to {most:,} bytes"
        raise InputError(f"{path} has {size:,} bytes where {data_set.name} has {wanted}; {remedy}")


Arrays = tuple[np.ndarray, np.ndarray]
"""uint8 pictures of shape [n, 3, 32, 32] and int64 labels of shape [n]."""


def read(data_set: Cifar, directory: Path) -> tuple[Arrays, Arrays]:
    """Return the training set and the test set.

    Args:
        data_set: what to read.
        directory: the folder that an archive unpacks to, or its parent.

    Raises:
        InputError: what `find` refuses, or a file that cannot be read or holds something else.
    """
    folder, layout = find(data_set, directory)
    parts = [_read_file(folder / name, records, layout, data_set) for name, records in layout.files.items()]
    train_x, train_y = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return (train_x, train_y), parts[-1]


def _read_file(path: Path, records: int, layout: Layout, data_set: Cifar) -> Arrays:
    try:
        read_content = _read_binary if layout.label_bytes else _read_pickle
        x, y = read_content(path, records, layout)
        if len(wrong := np.flatnonzero(y >= data_set.classes)):
            raise _ContentError(f"picture {wrong[0]} has label {y[wrong[0]]}, beyond {data_set.classes - 1}")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except _ContentError as error:
        raise InputError(
            f"{path} is no file of {data_set.name}: {error}; unpack {layout.archive} from {SITE} afresh"
        ) from error
    return x.reshape(-1, 3, 32, 32), y


class _ContentError(Exception):
    """A file's content is not what it should be."""


def _read_binary(path: Path, records: int, layout: Layout) -> Arrays:
    labels = layout.label_bytes
    content = np.fromfile(path, np.uint8).reshape(records, labels + PIXELS)
    return content[:, labels:], content[:, labels - 1].astype(np.int64)


class _Recorded:
    """Stands in for every callable of a pickle: keeps what it is called with, and does nothing with it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments: tuple = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Builds numbers, bytes, lists and dicts; of anything else, a numpy array alone, and that as `_Recorded`.

    So nothing that a file names is ever imported or run.
    """

    _names = frozenset(
        [
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        ]
    )

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> type[_Recorded]:
        """Return the stand-in of an array's parts, or raise UnpicklingError."""
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no picture needs")
        return _Recorded


def _read_pickle(path: Path, records: int, layout: Layout) -> Arrays:
    key = layout.label_key
    with open(path, "rb") as file:
        try:
            content = _Unpickler(file).load()
        except OSError:
            raise
        except pickle.UnpicklingError as error:
            raise _ContentError(str(error)) from error
        except Exception as error:  # a broken pickle may raise anything
            raise _ContentError(f"a broken pickle ({type(error).__name__})") from error
    if not isinstance(content, dict) or not {b"data", key} <= content.keys():
        raise _ContentError(f"not a dict with b'data' and {key!r}")
    try:
        labels = np.frombuffer(bytes([*content[key]]), np.uint8).astype(np.int64)
    except (TypeError, ValueError) as error:
        raise _ContentError(f"{key!r} is not a list of labels") from error
    if len(labels) != records:
        raise _ContentError(f"{key!r} has {len(labels)} labels for {records} pictures")
    return _array(content[b"data"], records), labels


def _array(recorded: Any, records: int) -> np.ndarray:
    """Return the uint8 array of shape [records, PIXELS] that a pickle describes, or raise _ContentError."""
    match recorded:
        case _Recorded(state=(_, (rows, columns), _Recorded(arguments=(b"u1" | "u1", *_)), fortran, bytes(pixels))):
            if (rows, columns, len(pixels)) == (records, PIXELS, records * PIXELS):
                return np.frombuffer(bytearray(pixels), np.uint8).reshape(
                    records, PIXELS, order="F" if fortran else "C"
                )
    raise _ContentError(f"b'data' is not a uint8 array of shape [{records}, {PIXELS}]")
