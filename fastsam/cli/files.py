"""Whole files or none: what is written takes its place at the end; and the environment that the numbers depend on."""

import json
import math
import os
import platform
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastsam import __version__
from fastsam.cli.errors import InputError

CHECKPOINT = "checkpoint.pt"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` at the end, or is removed if anything goes wrong.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Make a directory with its parents, or raise InputError if that fails or nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file.

    Args:
        path: where; a file that is there is replaced.
        text: what.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON; numbers that are not finite become null, since JSON has no word for them.

    Args:
        path: where; a file that is there is replaced.
        value: dicts, lists, tuples, strings, numbers, booleans and None.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write what `read_checkpoint` reads, or leave the file that is there if that fails or is interrupted.

    Args:
        path: where; a file that is there is replaced.
        checkpoint: config, history and states, tensors among them.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch closes its archive after a failed write too, which fails in turn and hides a full disk or Ctrl-C
            raise error.__context__ or error from None


def read_archive(path: Path) -> Any:
    """Return what torch.save wrote into a file, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read.
    """
    try:
        # torch reads past flipped bits; the archive has a checksum of every part of it
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        # a damaged archive ends in whatever error its bytes lead to
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        raise InputError(f"{path} is broken, or no checkpoint") from error
    if damaged:
        raise InputError(f"{path} is broken: {damaged} in it is not what was written")
    return content


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the checkpoint at `path`, its tensors on the CPU.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        checkpoint = read_archive(path)
    except FileNotFoundError as error:
        raise InputError(f"nothing to resume: {path} does not exist") from error
    parts = {"config", "history", "model", "optimizer", "of each process"}
    if not isinstance(checkpoint, dict) or not parts <= set(checkpoint):
        raise InputError(f"{path} is not a checkpoint of fastsam train")
    return checkpoint


@contextmanager
def contents_of(path: Path) -> Iterator[None]:
    """Turn whatever a checkpoint's contents lead to into an InputError: someone may have altered them.

    Args:
        path: the checkpoint's, for the message.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise InputError(f"{path} does not hold the state of such a run ({reason})") from error


def environment(device: str) -> dict[str, Any]:
    """Return what the numbers depend on: versions, device, threads, and the date in UTC."""
    return {
        "fastsam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
