"""SAF: Sharpness-Aware Training for Free (Du et al. 2022, https://arxiv.org/abs/2205.14083).

    z      = f_w(x)                                      logits of this epoch e
    t      = z of epoch e - lag, of the same sample
    record z
    loss   = CE(z, y) + lam tau^2 KL(softmax(t / tau) || softmax(z / tau))     (Eq. 9, from epoch start_epoch + 1 on)

One forward and backward, and one kernel for the four lines. tau^2 stands in the authors' code, not in the paper. See
docs/algorithms.md#saf.
"""

import logging
import os
import warnings
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.arguments import LARGEST_INTEGER, check_flag, check_integer, shown
from fastsam.trajectory.history import History, open_shared
from fastsam.trajectory.loss import Trajectory, uncompiled
from fastsam.trajectory.samples import SampleToRankSampler
from fastsam.trajectory.storage import DTYPES, Fields, Layout
from fastsam.two_pass import capture
from fastsam.two_pass.stage import Stage, under_way

logger = logging.getLogger("fastsam")


class SAF(Trajectory):
    """Sharpness-aware training for free: cross-entropy plus the divergence from the logits of `lag` epochs ago.

    Call it with the ids of the samples, and `set_epoch(e)` at the start of every epoch, counted from 1::

        saf = SAF(num_samples=len(train_set), num_classes=10)
        for epoch in range(1, epochs + 1):
            saf.set_epoch(epoch)
            for x, y, ids in loader:                 # of IndexedDataset(train_set)
                loss = saf(model(x), y, ids)

    A row whose sample has no record of exactly `lag` epochs ago has no divergence, but stays in the divisor. A sample
    that an epoch meets again, as with repeated augmentation or weighted sampling, finds its past each time; of a batch
    its first row is recorded, of an epoch its last batch. Rows of `ignore_index` count in nothing and are not recorded.
    In eval mode,
    and while lam = 0, it is `F.cross_entropy` itself and touches nothing; up to epoch `start_epoch` it is
    `F.cross_entropy` and records. Under mixup or CutMix pass class-probability targets and the first picture's ids, as
    the authors do, or better turn mixing off, since the record is of another picture then.

    Inside `step(losses, ...)` or `ascent()`/`descent()` of a fastsam optimizer use reduction="none" or "mean" as that
    needs; what is recorded is the first pass, at the end of the step, and all passes see the same past.

    With several processes samples have to find their records again: pass `sampler`, or let all processes map one
    directory (`storage`). After every epoch's `set_epoch` all processes of a shared directory meet at a barrier.

    Ids on a GPU are checked there: one out of range gets no divergence and no record, and the next `set_epoch`,
    `state_dict` or `check_ids` raises. Ids on the CPU are checked at once, before anything is recorded.

    Args:
        num_samples: size of the training set; ids are in [0, num_samples).
        num_classes: number of classes C >= 2.
        lam: weight of the divergence, >= 0.
        tau: temperature, > 0.
        lag: how many epochs ago the past is, >= 1. Of each sample lag + 1 records are kept.
        start_epoch: the divergence counts after this epoch, from epoch start_epoch + 1 on.
        history_dtype: of the records: torch.float16, bfloat16, float32, float64, or int8 with one scale per record.
            float16 records are clamped to its range.
        device: where the records lie with storage="device". Default: where the first logits are.
        label_smoothing: of the cross-entropy, in [0, 1]: (1 - s) one-hot + s / C.
        tau_squared: multiply the divergence by tau^2.
        ignore_index: class index of rows that do not count.
        reduction: "mean" over the rows that count, "sum", or "none" for a loss per row.
        storage: "device"; "host" for pinned memory, where `prefetch` fetches the next batch's records ahead; or a
            directory for memory-mapped files, which take their room on the disk at once. With "host", or a directory
            and a GPU, ids have to be on the CPU. One history at a time uses a directory.
        resume: go on with the files in the directory. Without it a directory that holds a history is refused. Files
            are refused that are missing, cut short, unreadable, of another layout, of another run than the loaded
            checkpoint, or, in one process, where records that a `state_dict` has seen are no longer what they were:
            its first call after an epoch reads the records of that epoch, about 2 GB a second.
        sampler: the `SampleToRankSampler` in use; then this process keeps its own samples' records alone.
        save_history: whether `state_dict` holds the records. Without them a resumed run has no past for `lag` epochs,
            unless a directory kept it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, named with its value.
        MemoryError: the records do not fit.
        FileExistsError: the directory holds the history of an earlier run.
        RuntimeError: several processes, and neither a sampler nor a directory; here, or where the process group was
            started later, in the first call. Or another history uses the directory.
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 0.3,
        tau: float = 5.0,
        lag: int = 3,
        start_epoch: int = 5,
        history_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        label_smoothing: float = 0.0,
        tau_squared: bool = True,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        storage: Literal["device", "host"] | os.PathLike | str = "device",
        resume: bool = False,
        sampler: SampleToRankSampler | None = None,
        save_history: bool = True,
    ) -> None:
        super().__init__(lam, tau, start_epoch, label_smoothing, tau_squared, ignore_index, reduction)
        check_integer("num_samples", num_samples, 1, LARGEST_INTEGER)
        check_integer("num_classes", num_classes, 2, LARGEST_INTEGER)
        check_integer("lag", lag, 1, LARGEST_INTEGER)
        for name, flag in (("resume", resume), ("save_history", save_history)):
            check_flag(name, flag)
        if history_dtype not in DTYPES:
            raise ValueError(f"history_dtype must be one of {', '.join(map(str, DTYPES))}, got {shown(history_dtype)}")
        if not isinstance(storage, (str, os.PathLike)) or not os.fspath(storage):
            raise TypeError(f"storage must be 'device', 'host' or the path of a directory, got {shown(storage)}")
        if sampler is not None and not isinstance(sampler, SampleToRankSampler):
            raise TypeError(f"sampler must be a fastsam.SampleToRankSampler or None, got {shown(sampler)}")
        if sampler is not None and sampler.num_samples != num_samples:
            raise ValueError(f"num_samples is {num_samples}, but the sampler's is {sampler.num_samples}")
        self.num_samples, self.num_classes, self.lag = num_samples, num_classes, lag
        self.sampler, self.storage, self.save_history = sampler, storage, save_history
        self._history: History | None = None
        self._shared = self._knows_processes = False
        self._check_processes()
        own_samples = num_samples if sampler is None else sampler.num_own_samples
        self._layout = Layout(own_samples, num_classes, lag, history_dtype)
        self._resume = resume
        self._loaded: Fields | None = None
        self._expected_run: str | None = None
        self._rows_this_epoch = 0
        if device is not None:
            self._open(torch.device(device))

    def _check_processes(self) -> None:
        """Find whether processes share the records; raise RuntimeError where each would have its own."""
        if self._history is None:
            self._shared = self.storage not in ("device", "host") and _world_size() > 1
        if _world_size() > 1 and self.sampler is None and not self._shared:
            if self.storage not in ("device", "host"):
                raise RuntimeError(
                    f"SAF has opened {self.storage} before the group of {_world_size()} processes was there to share "
                    "it; make SAF after init_process_group, or without device="
                )
            raise RuntimeError(
                f"{_world_size()} processes: a sample that moves to another one would not find its past there (the "
                "authors' code finds one in that many). Train with SampleToRankSampler and pass it as sampler=, or "
                "pass a directory that all processes share as storage=, which works with torch's DistributedSampler"
            )

    @property
    def memory_bytes(self) -> int:
        """Bytes that the records of this process take."""
        return self._layout.nbytes

    def _open(self, device: torch.device) -> History:
        # The size is logged before any of it is allocated.
        logger.info("SAF's history, on %s: %s", device if self.storage == "device" else self.storage, self._layout)
        make = open_shared if self._shared else History
        history = make(self._layout, self.storage, device, self._resume)
        self._check_run(history.run)
        self._history = history
        if self._loaded is not None:
            self._history.load_state_dict(self._loaded)
            self._loaded = None
        return self._history

    def _check_run(self, run: str | None) -> None:
        """Raise ValueError if the checkpoint that was loaded goes with the files of another run."""
        if None not in (run, self._expected_run) and run != self._expected_run:
            raise ValueError(
                f"{self.storage} holds the history of another run than the checkpoint's; give the directory of that "
                "one with resume=True, or load the checkpoint into a SAF with storage='device' to go on without records"
            )

    @uncompiled
    def forward(self, logits: Tensor, targets: Tensor, sample_ids: Tensor) -> Tensor:
        """Return the loss, and record the logits.

        Args:
            logits: float64, float32, float16 or bfloat16 of shape [n, num_classes].
            targets: int64 class indices of shape [n], or class probabilities of shape [n, num_classes].
            sample_ids: integers in [0, num_samples) of shape [n], on the logits' device or on the CPU.

        Returns:
            The loss, 0-dim or of shape [n]: while the divergence is inactive that of `F.cross_entropy`, else float32,
            or float64 for float64 logits.

        Raises:
            TypeError: sample_ids are missing, or no integers.
            ValueError: a wrong shape, another number of classes, or, for ids on the CPU, one out of range.
            RuntimeError: between `first_step` and `second_step`, whose first pass nobody could tell from a plain step.
        """
        self._check(logits, targets)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have {logits.shape[1]} classes, but SAF was made for {self.num_classes}")
        self._check_ids(sample_ids, len(logits))
        capture.watch(lambda: (self.epoch, self.training, self.lam, self.tau))
        if not self.training or self.lam == 0:
            return self._cross_entropy(logits, targets)
        step = under_way()
        if step is not None and step.stage is Stage.FIRST:
            raise RuntimeError(
                "SAF cannot follow first_step() and second_step(): the first pass has been recorded already. Use "
                "opt.step(losses, ...), or `with opt.ascent(): ...` and `with opt.descent(): ...`"
            )
        if not self._knows_processes:
            # Frameworks start the process group after the loss was made.
            self._check_processes()
            self._knows_processes = True
        history = self._history or self._open(logits.device)
        if capture.current() is not None and not history.direct:
            raise RuntimeError("SAF's records are not on the device, which a captured step needs; use storage='device'")
        positions = self._positions(sample_ids, logits.device if history.direct else torch.device("cpu"))
        if step is None:
            return self._loss_and_record(history, logits, targets, positions)
        # All passes of a fastsam optimizer's step read the same past, so the first is recorded when the step ends.
        if step.stage is not Stage.DESCENT:
            record = partial(self._record, history, logits.detach(), targets, positions, self.epoch)
            step.at_end.append(record)
        if not self.active:
            return self._cross_entropy(logits, targets)
        return self._loss(logits, targets, history.past(positions, self.epoch, record=False))

    def _loss_and_record(self, history: History, logits: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        if not self.active:
            loss = self._cross_entropy(logits, targets)
            self._record(history, logits.detach(), targets, positions, self.epoch)
            return loss
        loss = self._loss(logits, targets, history.past(positions, self.epoch, record=True))
        # The loss's kernel has recorded where it can do so in place.
        if history.direct:
            self._count(len(positions))
        else:
            self._record(history, logits.detach(), targets, positions, self.epoch)
        return loss

    def _record(self, history: History, logits: Tensor, targets: Tensor, positions: Tensor, epoch: int) -> None:
        history.record(logits, targets, positions, epoch, self.ignore_index)
        self._count(len(positions))

    def _count(self, batch_rows: int) -> None:
        """Warn where `set_epoch` seems not to be called, without which no sample has a past."""
        if (captured := capture.current()) is not None:
            captured.calls.append(partial(self._count, batch_rows))
            return
        before, self._rows_this_epoch = self._rows_this_epoch, self._rows_this_epoch + batch_rows
        if before <= 2 * self._layout.samples < self._rows_this_epoch:
            warnings.warn(
                f"SAF has seen {self._rows_this_epoch} rows of {self._layout.samples} samples in epoch {self.epoch}; "
                "call set_epoch(e) at the start of every epoch, or no sample has a past",
                stacklevel=2,
            )

    def prefetch(self, sample_ids: Tensor) -> None:
        """Fetch the records of the next batch while the device works on this one; only host memory and files need it.

        Args:
            sample_ids: integers of shape [n] on the CPU, those of the next call.

        Raises:
            TypeError: sample_ids are no tensor of integers.
            ValueError: a wrong shape, or an id out of range.
        """
        self._check_ids(sample_ids, len(sample_ids))
        if self._history is not None and self.active:
            self._history.prefetch(self._positions(sample_ids, torch.device("cpu")), self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 1 as in the paper; with a shared directory, in all processes together.

        Raises:
            TypeError: the epoch is no integer.
            ValueError: it is below 1.
            IndexError: a sample id was out of range since the last call.
        """
        super().set_epoch(epoch)
        self._rows_this_epoch = 0
        if self._history is not None:
            self._history.flush()
        if self._shared:
            dist.barrier()
        # After the barrier, so that no process waits there for one that raises.
        self.check_ids()

    # sample ids

    def check_ids(self) -> None:
        """Wait for the device, and raise IndexError if a sample id on it was out of range since the last check."""
        if self._history is None:
            return
        count, position = self._history.errors.tolist()
        if count:
            self._history.errors.zero_()
            raise IndexError(
                f"{count} sample ids were out of range, one of them row {position}; they are in [0, {self.num_samples})"
                ", and with a sampler on the rank it gives them to. These rows had no divergence and were not recorded"
            )

    def _check_ids(self, sample_ids: Any, n: int) -> None:
        if not isinstance(sample_ids, Tensor):
            raise TypeError(
                f"sample_ids must be a tensor of sample ids, got {type(sample_ids).__name__}; wrap the dataset in "
                "IndexedDataset"
            )
        if sample_ids.dtype == torch.bool or sample_ids.is_floating_point() or sample_ids.is_complex():
            raise TypeError(f"sample_ids must be integers, got {sample_ids.dtype}")
        if sample_ids.shape != (n,):
            raise ValueError(f"sample_ids must have shape [{n}], one for each row, got {list(sample_ids.shape)}")
        if sample_ids.device.type == "cpu" and n and capture.current() is None:
            low, high = (int(end) for end in sample_ids.aminmax())
            if low < 0 or high >= self.num_samples:
                bad = low if low < 0 else high
                raise ValueError(f"sample id {bad} is out of range; num_samples is {self.num_samples}")
            if self.sampler is not None and bool((sample_ids % self.sampler.num_replicas != self.sampler.rank).any()):
                raise ValueError(
                    f"sample_ids hold one that SampleToRankSampler does not give to rank {self.sampler.rank}"
                )

    def _positions(self, sample_ids: Tensor, device: torch.device) -> Tensor:
        """Return where this process's history keeps the samples: int64 of shape [n] on `device`.

        A sample that the sampler gives to another rank gets -1, which is out of range.
        """
        if sample_ids.device != device and device.type == "cpu":
            raise ValueError(
                f"sample_ids are on {sample_ids.device}, but the records are not; keep the ids on "
                " the CPU, as the loader yields them, so that nothing waits for the device"
            )
        ids = sample_ids.to(device, torch.int64, non_blocking=True)
        if self.sampler is None:
            return ids.contiguous()
        world, rank = self.sampler.num_replicas, self.sampler.rank
        return torch.where(ids % world == rank, ids.div(world, rounding_mode="floor"), -1)

    # checkpoints

    def get_extra_state(self) -> dict[str, Any]:
        """Return the epoch and, with `save_history`, the records: the tensors themselves, not copies."""
        self.check_ids()
        records = self._history.state_dict() if self._history is not None else self._loaded
        state = {"epoch": self.epoch, "lag": self.lag, "history": records if self.save_history else None}
        run = self._history.run if self._history is not None else self._expected_run
        return state if run is None else {**state, "run": run}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same layout, or from one without records.

        Raises:
            ValueError: the records are of other sizes, or left in the files of another run; nothing is changed.
        """
        records = state["history"] if self.save_history else None
        before, self._expected_run = self._expected_run, state.get("run") if records is None else None
        try:
            self._check_run(self._history.run if self._history is not None else None)
        except ValueError:
            self._expected_run = before
            raise
        if records is not None:
            records = self._layout.checked(records)
            if self._history is None:
                self._loaded = {name: field.clone() for name, field in records.items()}
            else:
                self._history.load_state_dict(records)
        self.epoch, self._rows_this_epoch = state["epoch"], 0

    def _apply(self, fn: Any, recurse: bool = True) -> "SAF":
        """Follow `to`, `cuda` and `cpu`; the records keep their dtype."""
        super()._apply(fn, recurse)
        if self._history is not None:
            self._history.to(fn(torch.empty(0, device=self._history.device)).device)
        return self


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
