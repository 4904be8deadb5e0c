"""A history's files: one directory for one run, whose files are checked before they are trusted.

    history.json   the layout, which run it is, and a checksum of every slot that is complete
    tags.bin, records.bin, scales.bin
    lock           held by the process that records

Disk space is taken when the files are made, since a full disk would otherwise end the process by a signal in the middle
of an epoch. A slot's checksums are taken when a checkpoint is, and dropped before the slot is recorded into again; to
take those of a slot that an epoch has filled reads it once, about a second for 2 GB.
"""

import errno
import json
import os
import shutil
import socket
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsam.trajectory.storage import Fields, Layout, refuse_if_too_big

_ZEROS = bytes(1 << 20)


class HistoryFiles:
    """The files of a history in a directory, mapped into memory.

    Args:
        layout: what is kept.
        directory: where the files are, or are made.
        resume: take over what the files hold.
        is_shared: several processes map them. Then no checksums are kept, since nobody knows when all have written.
        is_owner: this process makes or checks the files and holds the lock; the others of its run map them after it.

    Raises:
        FileExistsError: the directory holds a history, and resume is False.
        RuntimeError: another process, or another history of this one, is using it.
        ValueError: it holds no history or one of another layout, or a file is missing, cut short, unreadable or
            damaged, and resume is True.
        MemoryError: new files do not fit onto the disk.
    """

    def __init__(
        self, layout: Layout, directory: Path, resume: bool, is_shared: bool = False, is_owner: bool = True
    ) -> None:
        self.layout, self.directory, self.is_shared = layout, directory, is_shared
        self.checksums: dict[str, dict[str, int]] = {}
        if not resume:
            directory.mkdir(parents=True, exist_ok=True)
        elif not self._description.exists():
            raise ValueError(f"{directory} holds no history; it cannot be resumed")
        self._lock = DirectoryLock(directory) if is_owner else None
        if resume:
            self._take_over(verify=is_owner)
        else:
            self._make()

    @property
    def _description(self) -> Path:
        return self.directory / "history.json"

    def _make(self) -> None:
        if self._description.exists():
            raise FileExistsError(
                f"{self.directory} holds the history of an earlier run; delete it, or go on with resume=True"
            )
        refuse_if_too_big(self.layout, str(self.directory), shutil.disk_usage(self.directory).free)
        try:
            for name, nbytes in self._sizes().items():
                _allocate(self._path(name), nbytes)
        except OSError as error:
            for name in self._sizes():
                self._path(name).unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            refuse_if_too_big(self.layout, str(self.directory), 0)
        self.fields, self.run = self._mapped(), uuid.uuid4().hex
        self._describe()

    def _take_over(self, verify: bool) -> None:
        about = self._read_description()
        for name, nbytes in self._sizes().items():
            _check_file(self._path(name), nbytes)
        self.run = about.get("run") or uuid.uuid4().hex
        self.fields, self.checksums = self._mapped(), about.get("checksums", {})
        if not verify:
            return
        for slot, expected in self.checksums.items():
            for name, checksum in self._sums(int(slot)).items():
                if checksum != expected[name]:
                    raise ValueError(
                        f"{self._path(name)} is damaged: slot {slot} is not what was written; it cannot be resumed"
                    )
        if self.is_shared:
            self.checksums = {}
        self._describe()

    def _read_description(self) -> dict[str, Any]:
        path = self._description
        try:
            about = json.loads(path.read_text())
            # Earlier versions wrote neither a run nor a checksum, and "top_k": null for the histories there are now.
            is_whole = about.pop("checksum", None) == _checksum_of(about) or not {"run", "checksums"} & about.keys()
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); it cannot be resumed") from error
        if not is_whole:
            raise ValueError(f"{path} is damaged; it cannot be resumed")
        wanted = self.layout.as_json()
        if about.get("top_k") is not None or {key: about.get(key) for key in wanted} != wanted:
            raise ValueError(f"{self.directory} holds {about}, not the history {wanted}; it cannot be resumed")
        return about

    def _describe(self) -> None:
        about = {**self.layout.as_json(), "run": self.run, "checksums": self.checksums}
        temporary = self._description.with_suffix(".part")
        temporary.write_text(json.dumps({**about, "checksum": _checksum_of(about)}))
        os.replace(temporary, self._description)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def _sizes(self) -> dict[str, int]:
        fields = self.layout.fields().items()
        return {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in fields}

    def _mapped(self) -> Fields:
        return {
            name: torch.from_file(str(self._path(name)), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(
                shape
            )
            for name, (shape, dtype) in self.layout.fields().items()
        }

    def __deepcopy__(self, memo: Any) -> None:
        """Make nothing: a copy of a history has its records in memory."""

    def __reduce__(self) -> Any:
        return type(None), ()

    # checksums

    def _sums(self, slot: int) -> dict[str, int]:
        return {name: _crc(field[slot]) for name, field in self.fields.items()}

    def seal(self) -> None:
        """Keep the checksums of all slots that have none yet."""
        missing = [slot for slot in range(self.layout.slots) if str(slot) not in self.checksums]
        if self.is_shared or not missing:
            return
        self.checksums |= {str(slot): self._sums(slot) for slot in missing}
        self._describe()

    def unseal(self, *slots: int) -> None:
        """Drop the checksums of slots that are about to change."""
        if any(self.checksums.pop(str(slot), None) for slot in slots):
            self._describe()


class DirectoryLock:
    """A lock on a directory that ends with its process or with this object, whichever is first.

    Raises:
        RuntimeError: somebody else holds it.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        self._file = open(path, "a+")  # noqa: SIM115
        if not _locks(self._file):
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise RuntimeError(
                f"{directory} is in use by another history ({holder}); give each run a directory of its own, or end "
                "that one first"
            )
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _locks(file: Any) -> bool:
    """Take the lock of an open file, if nobody has it; file systems and machines without locks have none."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _allocate(path: Path, nbytes: int) -> None:
    """Make a file of zeros that has its room on the disk, or raise OSError."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            for start in range(0, nbytes, len(_ZEROS)):
                file.write(_ZEROS[: nbytes - start])


def _check_file(path: Path, nbytes: int) -> None:
    try:
        with open(path, "r+b") as file:
            actual = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}); it cannot be resumed") from error
    if actual != nbytes:
        raise ValueError(f"{path} has {actual} bytes, not {nbytes}; it cannot be resumed")


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


def _checksum_of(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())
