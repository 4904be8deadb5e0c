"""SAF's memory: what the model said of every sample in each of the last `lag` epochs.

    record[e mod lag][id] = logits of epoch e,    tag[e mod lag][id] = e

Epochs e and e - lag share a slot, so a row is read before it is overwritten and `lag` slots suffice. A row counts as
the past of epoch e only if its tag is exactly e - lag: one that was never written, or that an epoch passed over, does
not.

Where the records lie on the device of the logits, the kernel walks them in place. Otherwise, in host memory or in files,
the rows of a batch travel: fetched before the loss, brought home after it.
"""

import os
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.kernels import ops
from fastsam.kernels.reference import Past
from fastsam.kernels.reference_trajectory_loss import NEVER
from fastsam.trajectory.storage import Fields, Layout, allocate, map_files


class History:
    """The records of all samples, on a device, in pinned host memory, or in files that processes share.

    Args:
        layout: what is kept.
        storage: "device", "host", or a directory for files that are mapped into memory.
        device: where the logits are, and with "device" the records.
        resume: take over the files in the directory, rather than refuse to.

    Raises:
        MemoryError: the records do not fit into the memory or onto the disk.
        FileExistsError: the directory holds a history, and resume is False.
        ValueError: it holds none or one of another layout, and resume is True.
    """

    def __init__(self, layout: Layout, storage: str | os.PathLike, device: torch.device, resume: bool = False) -> None:
        self.layout, self.storage, self.device = layout, storage, device
        if storage in ("device", "host"):
            self._fields = allocate(layout, device if storage == "device" else torch.device("cpu"), device)
        else:
            self._fields = map_files(layout, Path(storage), resume)
        self.errors = torch.zeros(2, dtype=torch.int64, device=device)
        """How many sample ids were out of range, and one of them, as the kernel found."""
        self._coming: _Travelling | None = None
        self._leaving: _Travelling | None = None

    @property
    def direct(self) -> bool:
        """Whether the kernel can walk the records where they are."""
        return self._home == self.device

    @property
    def _home(self) -> torch.device:
        return self._fields["tags"].device

    def _slot(self, epoch: int) -> Fields:
        return {name: field[epoch % self.layout.lag] for name, field in self._fields.items()}

    def past(self, ids: Tensor, epoch: int, record: bool) -> Past:
        """Return where `trajectory_loss` finds the logits of `epoch - lag`, and where it records those of `epoch`.

        Args:
            ids: int64 rows of this history, shape [n]; on `device` if the history is `direct`, else on the host.
            epoch: the present one, from 1.
            record: whether the loss records; only a `direct` history's does, others need `record` afterwards.
        """
        wanted = epoch - self.layout.lag if epoch > self.layout.lag else -1  # 0 is the tag of what was never written
        if self.direct:
            slot = {name: field[:-1] for name, field in self._slot(epoch).items()}
            return Past(slot["records"], slot.get("scales"), slot["tags"], ids, epoch, wanted, record, self.errors)
        self.flush()
        fields = self._arrived(ids, epoch)
        own = torch.arange(len(ids), device=self.device)
        return Past(fields["records"], fields.get("scales"), fields["tags"], own, epoch, wanted, False, None)

    def record(self, logits: Tensor, targets: Tensor, ids: Tensor, epoch: int, ignore_index: int) -> None:
        """Record logits of shape [n, classes] as those of `epoch`; rows with an ignored target are left out.

        Args:
            logits: on `device`.
            targets: as for `trajectory_loss`.
            ids: as for `past`.
            epoch: the present one.
            ignore_index: of int64 targets.
        """
        if self.direct:
            ops.pick([logits]).record_(logits, self.past(ids, epoch, True), targets, ignore_index)
            return
        self.flush()
        fields = self._blank(len(ids))
        own = torch.arange(len(ids), device=self.device)
        block = Past(fields["records"], fields.get("scales"), fields["tags"], own, epoch, 0, True, None)
        ops.pick([logits]).record_(logits, block, targets, ignore_index)
        self._leaving = _Travelling(ids, epoch, fields, self._home)

    def prefetch(self, ids: Tensor, epoch: int) -> None:
        """Set the rows of the next batch in motion while the device is busy with this one; `ids` as for `past`."""
        if not self.direct:
            self._coming = self._fetch(ids, epoch)

    def flush(self) -> None:
        """Write the rows that are on their way home."""
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            return
        fields = leaving.arrive(wait=True)
        rows = torch.where(fields["tags"] > 0, self._rows(leaving.ids).to(self._home), self.layout.rows)
        slot = self._slot(leaving.epoch)
        slot["tags"].index_fill_(0, rows, NEVER)  # a row that an interrupt leaves half-written is nobody's past
        for name in sorted(slot, key="tags".__eq__):
            slot[name].index_copy_(0, rows, fields[name])

    def _blank(self, n: int) -> Fields:
        fields = self.layout.fields().items()
        return {name: torch.zeros((n, *shape[2:]), dtype=dtype, device=self.device) for name, (shape, dtype) in fields}

    def _fetch(self, ids: Tensor, epoch: int) -> "_Travelling":
        self.flush()
        rows = self._rows(ids).to(self._home)
        fields = {name: field.index_select(0, rows) for name, field in self._slot(epoch).items()}
        fields["tags"] = self._tags(rows, epoch)
        return _Travelling(ids, epoch, fields, self.device)

    def _arrived(self, ids: Tensor, epoch: int) -> Fields:
        """Return the rows on `device`, those that were fetched ahead if they are these."""
        coming, self._coming = self._coming, None
        if coming is None or coming.epoch != epoch or not torch.equal(coming.ids, ids):
            return self._fetch(ids, epoch).arrive()
        # a row that was recorded since has another tag now
        tags = _Travelling(ids, epoch, {"tags": self._tags(self._rows(ids).to(self._home), epoch)}, self.device)
        return coming.arrive() | tags.arrive()

    def _tags(self, rows: Tensor, epoch: int) -> Tensor:
        tags = self._slot(epoch)["tags"].index_select(0, rows)
        return torch.where(rows == self.layout.rows, 0, tags)

    def _rows(self, ids: Tensor) -> Tensor:
        """Return ids, but the spare row where an earlier row of the batch has the same one."""
        order = ids.argsort(stable=True)
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[order[1:]] = ids[order[1:]] == ids[order[:-1]]
        return torch.where(repeated, self.layout.rows, ids)

    # checkpoints

    def state_dict(self) -> Fields:
        """Return all records and tags: the tensors themselves, not copies."""
        self.flush()
        return dict(self._fields)

    def load_state_dict(self, state: Fields) -> None:
        """Copy the records of a history of the same layout.

        Raises:
            ValueError: the layout is another; nothing is changed.
        """
        self.layout.check(state)
        self._coming = self._leaving = None
        for name, field in self._fields.items():
            field.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Follow the model to another device; records in host memory or in files stay there."""
        self.flush()
        self._coming, self.device, self.errors = None, device, self.errors.to(device)
        if self.storage == "device":
            self._fields = {name: field.to(device) for name, field in self._fields.items()}


class _Travelling:
    """Rows of one batch between two devices; on their way from the moment of construction."""

    def __init__(self, ids: Tensor, epoch: int, fields: Fields, to: torch.device) -> None:
        self.ids, self.epoch, self._event = ids, epoch, None
        if fields["tags"].device != to:
            fields = {name: _start(field, to) for name, field in fields.items()}
            self._event = torch.cuda.Event()
            self._event.record()
        self._fields = fields

    def arrive(self, wait: bool = False) -> Fields:
        """Return the rows; with `wait` they are there, else later work on the device finds them there."""
        if wait and self._event is not None:
            self._event.synchronize()
        return self._fields


def _start(field: Tensor, to: torch.device) -> Tensor:
    """Copy through pinned memory, without waiting; torch keeps it alive until the copy is done."""
    if to.type == "cpu":
        return torch.empty(field.shape, dtype=field.dtype, pin_memory=True).copy_(field, non_blocking=True)
    return field.pin_memory().to(to, non_blocking=True)


def open_shared(layout: Layout, storage: str | os.PathLike, device: torch.device, resume: bool) -> History:
    """Return a history in files that all processes of the default group map; every process has to call it.

    Raises:
        RuntimeError: rank 0 could not make it, or a process does not see rank 0's directory; on every rank.
    """
    mark = Path(storage) / "shared"
    history, said = None, [""]
    if dist.get_rank() == 0:
        try:
            history = History(layout, storage, device, resume)
            said = [uuid.uuid4().hex]
            mark.write_text(said[0])
        except Exception as error:  # told to all ranks, which would wait for this one
            said = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(said, src=0)
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, mark.exists() and mark.read_text() == said[0])
    if not seen[0]:
        raise RuntimeError(f"rank 0 could not open SAF's history: {said[0]}")
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise RuntimeError(
            f"ranks {blind} do not see rank 0's {storage}; SAF's history needs a directory that all share"
        )
    return history or History(layout, storage, device, resume=True)
