"""Pictures of one's own: a folder with a subfolder for each class, or a file of NumPy arrays.

    DIR/train/CLASS/*.png, DIR/test/CLASS/*.png      or DIR/CLASS/*.png, of which 30 % of each class are tested on
    FILE.npz with x_train, y_train, x_test, y_test   as Keras's archives; without the last two likewise

Pictures of a folder are of one size. x is [n, height, width] or [n, height, width, channels], of bytes, which are
cropped, flipped and normalised as CIFAR's are, or of float32 in [0, 1], which are taken as they are. y are integers
from 0 on.
"""

import zipfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fastsam.cli.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
PARTS = ("train", "test")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")

Arrays = tuple[np.ndarray, np.ndarray]
"""Pictures of shape [n, channels, height, width] and int64 labels of shape [n]."""


# a folder


def find_folder(directory: Path) -> Path:
    """Return a folder of pictures in full; no picture is read.

    Raises:
        InputError: Pillow is not installed, or there is no folder with at least two classes in it, each with pictures.
    """
    _pillow()
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; name one with a subfolder of pictures for each class")
    folders = [directory / part for part in PARTS] if has_parts(directory) else [directory]
    named = [[folder.name for folder in _classes(folder)] for folder in folders]
    if len(folders) > 1 and named[0] != named[1]:
        odd = sorted(set(named[0]) ^ set(named[1]))
        raise InputError(f"{directory}: class {odd[0]!r} is not in both of train and test")
    for folder in folders:
        for of_class in _classes(folder):
            if not _pictures(of_class):
                raise InputError(f"{of_class} holds no pictures ({', '.join(SUFFIXES)}); remove it, or fill it")
    return directory.resolve()


def has_parts(directory: Path) -> bool:
    """Whether a folder has a training set and a test set; one of them alone is refused with InputError."""
    there = [part for part in PARTS if (directory / part).is_dir()]
    if len(there) == 1:
        raise InputError(f"{directory} has {there[0]} but not its counterpart; make both train and test, or neither")
    return bool(there)


def read_folder(directory: Path) -> list[Arrays]:
    """Return the training set and the test set of a folder, or the one set that it is.

    Args:
        directory: what `find_folder` returned.

    Raises:
        InputError: a picture cannot be read, or is of another size than the first.
    """
    find_folder(directory)
    folders = [directory / part for part in PARTS] if has_parts(directory) else [directory]
    listed = [
        [(path, label) for label, of_class in enumerate(_classes(folder)) for path in _pictures(of_class)]
        for folder in folders
    ]
    read = [_read_picture(path) for part in listed for path, _ in part]
    first = next(path for part in listed for path, _ in part)
    for picture, path in zip(read, (path for part in listed for path, _ in part), strict=True):
        if picture.shape[:2] != read[0].shape[:2]:
            sizes = " and ".join(f"{p.shape[1]}x{p.shape[0]}" for p in (read[0], picture))
            raise InputError(f"{first} and {path} are of {sizes} pixels; bring all pictures to one size first")
    # one channel where all pictures are grey
    channels = 3 if any(picture.ndim == 3 for picture in read) else 1
    x = np.stack([np.broadcast_to(p.reshape(*p.shape[:2], -1), (*p.shape[:2], channels)) for p in read])
    y = np.array([label for part in listed for _, label in part])
    x, cut = np.ascontiguousarray(x.transpose(0, 3, 1, 2)), [len(listed[0])] if len(listed) > 1 else []
    return list(zip(np.split(x, cut), np.split(y, cut), strict=True))


def _classes(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) < 2:
        raise InputError(f"{folder} has {len(found)} subfolders; make one for each class, at least two")
    return found


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _pillow() -> Any:
    try:
        return import_module("PIL.Image")
    except ImportError as error:
        raise InputError("folder:DIR needs Pillow to read pictures: pip install pillow") from error


def _read_picture(path: Path) -> np.ndarray:
    """Return a picture's bytes, [height, width] of a grey one, else [height, width, 3]."""
    try:
        with _pillow().open(path) as picture:
            mode = picture.mode
            if mode[0] not in "IF":
                return np.asarray(picture.convert("L" if mode in ("1", "L") else "RGB"))
    except Exception as error:
        # a damaged file ends in whatever error its bytes lead to
        raise InputError(f"{path} cannot be read as a picture: {error}") from error
    raise InputError(f"{path} has more than 8 bits in each pixel (mode {mode}); save it with 8")


# a file of arrays


def find_arrays(file: Path) -> Path:
    """Return a file of arrays in full; no array is read.

    Raises:
        InputError: there is none, or it lacks an array.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no archive of arrays"
        raise InputError(f"cannot read {file}: {reason}; name one that np.savez wrote") from error
    wanted = ARRAYS if set(ARRAYS[2:]) & set(there) else ARRAYS[:2]
    if missing := [name for name in wanted if name not in there]:
        raise InputError(f"{file} has no array {missing[0]!r}; it has {', '.join(there) or 'none'}")
    return file.resolve()


def read_arrays(file: Path) -> list[Arrays]:
    """Return the training set and the test set of a file, or the one set that it is.

    Args:
        file: what `find_arrays` returned.

    Raises:
        InputError: an array cannot be read, or has another type, shape or range than it must have.
    """
    find_arrays(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = [archive[name] for name in ARRAYS if name in archive]
    except Exception as error:
        # a damaged archive ends in whatever error its bytes lead to
        raise InputError(f"{file} cannot be read: {error}") from error
    parts = [_checked(file, name, *arrays[i : i + 2]) for i, name in ((0, "train"), (2, "test"))[: len(arrays) // 2]]
    first, last = parts[0][0], parts[-1][0]
    if first.shape[1:] != last.shape[1:] or first.dtype != last.dtype:
        raise InputError(f"{file}: pictures of train and test are not of one shape and type")
    return parts


def _checked(file: Path, part: str, x: np.ndarray, y: np.ndarray) -> Arrays:
    what = f"{file}: x_{part}"
    if x.dtype not in (np.uint8, np.float32) or x.ndim not in (3, 4) or not x.size:
        raise InputError(
            f"{what} is {x.dtype} of shape {list(x.shape)}; it must be uint8 or float32, [n, height, width] or "
            "[n, height, width, channels]"
        )
    if x.dtype == np.float32 and not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise InputError(f"{what} must lie in [0, 1], and goes from {x.min():g} to {x.max():g}")
    # Keras's archives have labels of shape [n, 1]
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise InputError(f"{file}: y_{part} is {y.dtype} of shape {list(y.shape)}; it must be {len(x)} integers")
    if y.min() < 0:
        raise InputError(f"{file}: y_{part} holds {y.min()}; classes are numbered from 0")
    x = x[..., None] if x.ndim == 3 else x
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y.astype(np.int64)


def classes_of(parts: Sequence[Arrays]) -> int:
    """Return the number of classes: one more than the largest label.

    Raises:
        InputError: there are fewer than two, or one of which the training set has no picture.
    """
    classes = 1 + max(int(y.max()) for _, y in parts)
    # among so many numbers one is missing, however large the labels are
    first = np.arange(min(classes, 1 + len(parts[0][1])))
    if missing := np.setdiff1d(first, parts[0][1]).tolist():
        raise InputError(f"the training set has no picture of class {missing[0]}, though labels go to {classes - 1}")
    if classes < 2:
        raise InputError("all pictures are of class 0; training needs two classes")
    return classes
