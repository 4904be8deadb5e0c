"""SAF's memory: the logits of every sample in this epoch and in each of the last `lag` epochs.

    record[e mod (lag + 1)][id] = logits of epoch e,    tag[e mod (lag + 1)][id] = e

Of lag + 1 slots an epoch reads another one than it writes, so a sample that is seen again in the same epoch finds its
past again. A record counts as the past of epoch e only if its tag is exactly e - lag; one that was never written, or
that an epoch passed over, does not.

Where the records lie on the device of the logits, the kernel reads and writes them in place. Where they lie in host
memory or in files, those of a batch are copied to the device before the loss, and the new ones back after it.
"""

import os
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.kernels import ops
from fastsam.kernels.past import NEVER, Past
from fastsam.trajectory.files import HistoryFiles
from fastsam.trajectory.storage import Fields, Layout, allocate


class History:
    """The records of all samples, on a device, in pinned host memory, or in files that processes share.

    Args:
        layout: what is kept.
        storage: "device", "host", or a directory for files that are mapped into memory.
        device: where the logits are, and with "device" the records.
        resume: take over the files in the directory, rather than refuse to.
        is_shared: several processes map the files.
        is_owner: this process is the one of them that makes or checks the files.

    Raises:
        MemoryError: the records do not fit into the memory or onto the disk.
        FileExistsError, RuntimeError, ValueError: of a directory; see `HistoryFiles`.
    """

    def __init__(
        self,
        layout: Layout,
        storage: str | os.PathLike,
        device: torch.device,
        resume: bool = False,
        is_shared: bool = False,
        is_owner: bool = True,
    ) -> None:
        self.layout, self.storage, self.device = layout, storage, device
        self._files: HistoryFiles | None = None
        if storage in ("device", "host"):
            self._fields = allocate(layout, device if storage == "device" else torch.device("cpu"), device)
        else:
            self._files = HistoryFiles(layout, Path(storage), resume, is_shared, is_owner)
            self._fields = self._files.fields
        self.errors = torch.zeros(2, dtype=torch.int64, device=device)
        """How many positions were out of range, and one of them, as the kernel found."""
        self._prefetched: AsyncCopy | None = None
        self._pending_write: AsyncCopy | None = None

    @property
    def run(self) -> str | None:
        """What tells the files of a run from another's; None for records that are in no files."""
        return self._files.run if self._files is not None else None

    @property
    def direct(self) -> bool:
        """Whether the kernel can read and write the records in place."""
        return self._storage_device == self.device

    @property
    def _storage_device(self) -> torch.device:
        return self._fields["tags"].device

    def _slot(self, epoch: int) -> Fields:
        return {name: field[epoch % self.layout.slots] for name, field in self._fields.items()}

    def _rows_of(self, epoch: int) -> tuple[Tensor, Tensor | None, Tensor]:
        slot = {name: field[:-1] for name, field in self._slot(epoch).items()}
        return slot["records"], slot.get("scales"), slot["tags"]

    def past(self, positions: Tensor, epoch: int, record: bool) -> Past:
        """Return where `trajectory_loss` finds the logits of `epoch - lag`, and where it records those of `epoch`.

        Args:
            positions: where this history keeps the batch's samples, int64 of shape [n]; on `device` if the history is
                `direct`, else on the host.
            epoch: the present one, from 1.
            record: whether the loss records; only a `direct` history's does, others need `record` afterwards.
        """
        # 0 is the tag of what was never written.
        wanted = epoch - self.layout.lag if epoch > self.layout.lag else -1
        if self.direct:
            into = self._recorded(positions, epoch) if record else None
            return Past(*self._rows_of(epoch - self.layout.lag), positions, epoch, wanted, record, self.errors, into)
        self.flush()
        fields = self._fetched(positions, epoch)
        batch_rows = torch.arange(len(positions), device=self.device)
        return Past(fields["records"], fields.get("scales"), fields["tags"], batch_rows, epoch, wanted, False, None)

    def _recorded(self, positions: Tensor, epoch: int) -> Past:
        """Return where the logits of `epoch` are recorded in place."""
        if self._files is not None:
            self._files.unseal(epoch % self.layout.slots)
        return Past(*self._rows_of(epoch), positions, epoch, 0, True, self.errors)

    def record(self, logits: Tensor, targets: Tensor, positions: Tensor, epoch: int, ignore_index: int) -> None:
        """Record the logits as those of `epoch`; rows with an ignored target are left out.

        Args:
            logits: of shape [n, classes], on `device`.
            targets: as for `trajectory_loss`.
            positions: as for `past`.
            epoch: the present one.
            ignore_index: of int64 targets.
        """
        if self.direct:
            ops.record_(logits, self._recorded(positions, epoch), targets, ignore_index)
            return
        self.flush()
        fields = self._zeros(len(positions))
        batch_rows = torch.arange(len(positions), device=self.device)
        batch = Past(fields["records"], fields.get("scales"), fields["tags"], batch_rows, epoch, 0, True, None)
        ops.record_(logits, batch, targets, ignore_index)
        self._pending_write = AsyncCopy(positions, epoch, fields, self._storage_device)

    def prefetch(self, positions: Tensor, epoch: int) -> None:
        """Start to copy the records of the next batch while the device works on this one.

        Args:
            positions: as for `past`, those of the next batch.
            epoch: the present one.
        """
        if not self.direct:
            self._prefetched = self._fetch(positions, epoch)

    def flush(self) -> None:
        """Wait for the copy of the last batch's records, and write them into the storage."""
        pending = self._pending_write
        if pending is None:
            return
        fields = pending.result(wait=True)
        is_recorded = fields["tags"] > 0
        kept = self._without_repeats(pending.positions).to(self._storage_device)
        positions = torch.where(is_recorded, kept, self.layout.samples)
        slot = self._slot(pending.epoch)
        if self._files is not None:
            self._files.unseal(pending.epoch % self.layout.slots)
        # The tags are cleared first and written last, so that an interrupt leaves no tag on a half-written record.
        slot["tags"].index_fill_(0, positions, NEVER)
        for name in sorted(slot, key="tags".__eq__):
            slot[name].index_copy_(0, positions, fields[name])
        # only now, since an interrupt may come in between
        self._pending_write = None

    def _zeros(self, n: int) -> Fields:
        fields = self.layout.fields().items()
        return {name: torch.zeros((n, *shape[2:]), dtype=dtype, device=self.device) for name, (shape, dtype) in fields}

    def _fetch(self, positions: Tensor, epoch: int) -> "AsyncCopy":
        self.flush()
        stored, slot = positions.to(self._storage_device), self._slot(epoch - self.layout.lag)
        fields = {name: field.index_select(0, stored) for name, field in slot.items()}
        return AsyncCopy(positions, epoch, fields, self.device)

    def _fetched(self, positions: Tensor, epoch: int) -> Fields:
        """Return the batch's records on `device`: those that were prefetched if they are of this batch."""
        copy, self._prefetched = self._prefetched, None
        if copy is None or copy.epoch != epoch or not torch.equal(copy.positions, positions):
            return self._fetch(positions, epoch).result()
        return copy.result()

    def _without_repeats(self, positions: Tensor) -> Tensor:
        """Return the positions, but the spare last one where an earlier row of the batch has the same one."""
        order = positions.argsort(stable=True)
        is_repeated = torch.zeros_like(positions, dtype=torch.bool)
        is_repeated[order[1:]] = positions[order[1:]] == positions[order[:-1]]
        return torch.where(is_repeated, self.layout.samples, positions)

    # checkpoints

    def state_dict(self) -> Fields:
        """Return all records and tags: the tensors themselves, not copies."""
        self.flush()
        if self._files is not None:
            self._files.seal()
        return dict(self._fields)

    def load_state_dict(self, state: Fields) -> None:
        """Copy the records of a history of the same layout.

        Raises:
            ValueError: the layout is another; nothing is changed.
        """
        state = self.layout.checked(state)
        self._prefetched = self._pending_write = None
        if self._files is not None:
            self._files.unseal(*range(self.layout.slots))
        for name, field in self._fields.items():
            field.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Follow the model to another device; records in host memory or in files stay there."""
        self.flush()
        self._prefetched, self.device, self.errors = None, device, self.errors.to(device)
        if self.storage == "device":
            self._fields = {name: field.to(device) for name, field in self._fields.items()}


class AsyncCopy:
    """The records of one batch, copied to another device without waiting; the copy starts with the construction.

    Args:
        positions: of the batch's samples in the history, int64 of shape [n].
        epoch: whose slot the records are of.
        fields: what is copied, "tags" among them; not copied if it is on the device already.
        device: where it is copied to.
    """

    def __init__(self, positions: Tensor, epoch: int, fields: Fields, device: torch.device) -> None:
        self.positions, self.epoch, self._event = positions, epoch, None
        if fields["tags"].device != device:
            on_gpu = fields["tags"].device if device.type == "cpu" else device
            fields = {name: _start_copy(field, device) for name, field in fields.items()}
            self._event = torch.cuda.Event()
            # The copies run there, whatever the current device is.
            self._event.record(torch.cuda.current_stream(on_gpu))
        self._fields = fields

    def result(self, wait: bool = False) -> Fields:
        """Return the copies; they are complete if `wait`, else for work that is queued on the device from now on."""
        if wait and self._event is not None:
            self._event.synchronize()
        return self._fields


def _start_copy(field: Tensor, device: torch.device) -> Tensor:
    """Copy through pinned memory without waiting; torch keeps that memory until the copy is done."""
    if device.type == "cpu":
        return torch.empty(field.shape, dtype=field.dtype, pin_memory=True).copy_(field, non_blocking=True)
    return field.pin_memory().to(device, non_blocking=True)


def open_shared(layout: Layout, storage: str | os.PathLike, device: torch.device, resume: bool) -> History:
    """Return a history in files that all processes of the default group map; every process has to call it.

    Args:
        layout: what is kept.
        storage: a directory that all processes share.
        device: where the logits are.
        resume: take over the files in the directory, rather than refuse to.

    Raises:
        RuntimeError: rank 0 could not make it, or a process does not see rank 0's directory; on every rank.
    """
    token = Path(storage) / "shared"
    history, message = None, [""]
    if dist.get_rank() == 0:
        # A failure is told to all ranks, since they wait for this one.
        try:
            history = History(layout, storage, device, resume, is_shared=True)
            message = [uuid.uuid4().hex]
            token.write_text(message[0])
        except Exception as error:
            message = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(message, src=0)
    sees_token: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(sees_token, token.exists() and token.read_text() == message[0])
    if not sees_token[0]:
        raise RuntimeError(f"rank 0 could not open SAF's history: {message[0]}")
    if not all(sees_token):
        others = ", ".join(str(rank) for rank, sees in enumerate(sees_token) if not sees)
        raise RuntimeError(
            f"ranks {others} do not see rank 0's {storage}; SAF's history needs a directory that all share"
        )
    return history or History(layout, storage, device, resume=True, is_shared=True, is_owner=False)
