"""Where a history's tensors lie: their shapes and dtypes, and their memory on a device or the host."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)
_WIDE, _PADDING = 8, 16
"""A record whose length is no multiple of 8 is padded to one of 16, so that all can be moved in wide accesses."""

Fields = dict[str, Tensor]
"""Tensors of equal leading sizes by name: tags and records, and with int8 the records' scales."""


class Layout(NamedTuple):
    """What decides the memory of a history; a history can take over the records of another one of the same layout."""

    samples: int
    classes: int
    lag: int
    dtype: torch.dtype

    @property
    def slots(self) -> int:
        """Epochs that are kept: the one that is recorded, and the `lag` before it."""
        return self.lag + 1

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor of a history.

        "tags" are int32 of shape [lag + 1, samples + 1], "records" of shape [lag + 1, samples + 1, width >= classes],
        and "scales", with int8, float32 of shape [lag + 1, samples + 1]. The last position takes what is not to be
        recorded.
        """
        return self._with_slots(self.slots)

    def _with_slots(self, n_slots: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        slots = n_slots, self.samples + 1
        width = -(-self.classes // _PADDING) * _PADDING if self.classes % _WIDE else self.classes
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tags": (slots, torch.int32),
            "records": ((*slots, width), self.dtype),
        }
        if self.dtype == torch.int8:
            fields["scales"] = slots, torch.float32
        return fields

    def checked(self, fields: Fields) -> Fields:
        """Return the fields of a history of this layout, or raise ValueError if these are none.

        Those of earlier versions, with `lag` slots, get one more.
        """
        actual = {name: (tuple(field.shape), field.dtype) for name, field in fields.items()}
        if actual == self._with_slots(self.lag):
            return self._with_another_slot(fields)
        if actual != self.fields():
            raise ValueError(
                f"the checkpoint's history is of other samples, classes, lag or format: {_describe(actual)}; here it "
                f"is {_describe(self.fields())}. Make SAF as it was then, or with save_history=False to go on without "
                "records"
            )

        return fields

    def _with_another_slot(self, fields: Fields) -> Fields:
        grown = {
            name: field.new_zeros(shape)
            for (name, (shape, _)), field in zip(self.fields().items(), fields.values(), strict=True)
        }
        for slot, tags in enumerate(fields["tags"]):
            samples = (tags > 0).nonzero()[:, 0]
            to = tags[samples].long() % self.slots
            for name, field in fields.items():
                grown[name][to, samples] = field[slot, samples]
        return grown

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.fields().values())

    def as_json(self) -> dict[str, int | str]:
        """Return what identifies this layout in a directory of files; "rows" is the number of samples."""
        return {"rows": self.samples, "classes": self.classes, "lag": self.lag, "dtype": _name(self.dtype)}

    def __str__(self) -> str:
        return f"{self.slots} x {self.samples} x {self.classes} logits in {_name(self.dtype)}: {readable(self.nbytes)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(fields: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {_name(dtype)}" for name, (shape, dtype) in fields.items())


def readable(nbytes: float) -> str:
    """Return a number of bytes in words, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


def allocate(layout: Layout, storage_device: torch.device, device: torch.device) -> Fields:
    """Return the tensors of a new history, all zeros.

    Args:
        layout: what is kept.
        storage_device: where the tensors are to lie; the CPU's are pinned if `device` is a GPU.
        device: where the logits are.

    Raises:
        MemoryError: they do not fit.
    """
    refuse_if_too_big(layout, str(storage_device), _free_memory(storage_device))
    is_pinned = storage_device.type == "cpu" and device.type == "cuda"
    return {
        name: torch.zeros(shape, dtype=dtype, device=storage_device, pin_memory=is_pinned)
        for name, (shape, dtype) in layout.fields().items()
    }


def refuse_if_too_big(layout: Layout, where: str, free: int | None) -> None:
    """Raise MemoryError if a history does not fit.

    Args:
        layout: of the history.
        where: the device or directory, for the message.
        free: bytes that are free there; None if that is not known.
    """
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
