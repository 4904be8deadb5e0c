"""Where a history's tensors lie: their shapes and dtypes, their memory on a device or the host, and their files."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)
_WIDE, _PADDING = 8, 16
"""Rows whose length is no multiple of 8 are padded to one of 16, so that all can be moved in wide accesses."""

Fields = dict[str, Tensor]
"""Tensors of equal leading size by name: tags and records, and what a format needs besides."""


class Layout(NamedTuple):
    """What decides the memory of a history; histories of one layout can take over each other's records."""

    rows: int
    classes: int
    lag: int
    dtype: torch.dtype

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor; the row behind the last takes what is not to be recorded."""
        slots = self.lag, self.rows + 1
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"tags": (slots, torch.int32)}
        width = -(-self.classes // _PADDING) * _PADDING if self.classes % _WIDE else self.classes
        fields["records"] = (*slots, width), self.dtype
        if self.dtype == torch.int8:
            fields["scales"] = slots, torch.float32
        return fields

    def check(self, fields: Fields) -> None:
        """Raise ValueError unless these are the fields of a history of this layout."""
        found = {name: (tuple(field.shape), field.dtype) for name, field in fields.items()}
        if found != self.fields():
            raise ValueError(
                f"the checkpoint's history is of other samples, classes, lag or format: {_words(found)}; here it is "
                f"{_words(self.fields())}. Make SAF as it was then, or with save_history=False to go on without records"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all records and tags."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.fields().values())

    def __str__(self) -> str:
        return f"{self.lag} x {self.rows} x {self.classes} logits in {_name(self.dtype)}: {readable(self.nbytes)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(fields: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {_name(dtype)}" for name, (shape, dtype) in fields.items())


def readable(nbytes: float) -> str:
    """Return a number of bytes in words, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


def allocate(layout: Layout, home: torch.device, device: torch.device) -> Fields:
    refuse_if_too_big(layout, str(home), _free_memory(home))
    pinned = home.type == "cpu" and device.type == "cuda"
    return {
        name: torch.zeros(shape, dtype=dtype, device=home, pin_memory=pinned)
        for name, (shape, dtype) in layout.fields().items()
    }


def map_files(layout: Layout, directory: Path, resume: bool) -> Fields:
    """Return the tensors of a history in files, which all processes that map them share."""
    about, description = directory / "history.json", layout._asdict() | {"dtype": _name(layout.dtype)}
    if about.exists() and not resume:
        raise FileExistsError(f"{directory} holds the history of an earlier run; delete it, or go on with resume=True")
    if resume:
        # a directory written while there were top-k histories says "top_k": null
        found = {k: v for k, v in json.loads(about.read_text()).items() if v is not None} if about.exists() else None
        if found != description:
            raise ValueError(f"{directory} holds {found}, not the history {description}; it cannot be resumed")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_if_too_big(layout, str(directory), shutil.disk_usage(directory).free)
    fields = {}
    for name, (shape, dtype) in layout.fields().items():
        path = directory / f"{name}.bin"
        if not resume:
            path.unlink(missing_ok=True)
        size = torch.Size(shape).numel()  # a new file is all zeros, and takes no room before it is written
        fields[name] = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
    about.write_text(json.dumps(description))
    return fields


def refuse_if_too_big(layout: Layout, where: str, free: int | None) -> None:
    """Raise MemoryError if a history does not fit into the bytes that are free; None means nobody knows."""
    if free is None or layout.nbytes <= free:
        return
    smaller = layout._replace(dtype=torch.int8)
    raise MemoryError(
        f"SAF's history ({layout}) does not fit on {where}, which has {readable(free)} free; "
        f"history_dtype=torch.int8 takes {readable(smaller.nbytes)}, a smaller lag less; "
        "storage='host' or a directory keeps it elsewhere"
    )


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
