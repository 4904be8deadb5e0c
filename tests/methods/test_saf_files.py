"""SAF's files: what is not the history that this run has left is refused by name, and a full disk is an error."""

import copy
import errno
import gc
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastsam import SAF

N, C = 40, 8


def saf(directory, **keywords):
    return SAF(N, C, lag=2, start_epoch=1, storage=directory, device="cpu", **keywords)


def step(loss, epoch):
    generator = torch.Generator().manual_seed(epoch)
    loss.set_epoch(epoch)
    return loss(torch.randn(N, C, generator=generator), torch.arange(N) % C, torch.randperm(N, generator=generator))


def left_by_a_run(directory, epochs=3, **keywords):
    """A directory that a run has filled, and its checkpoint."""
    loss = saf(directory, **keywords)
    for epoch in range(1, epochs + 1):
        step(loss, epoch)
    return copy.deepcopy(loss.state_dict())


FILES = ("records.bin", "scales.bin", "tags.bin", "history.json")


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_and_cut_files_are_refused_by_name(tmp_path, name):
    left_by_a_run(tmp_path, history_dtype=torch.int8)
    path = tmp_path / name
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for position in random.integers(len(whole), size=15).tolist():
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(random.integers(8))
        for damaged in (bytes(flipped), whole[:position]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=name if damaged else "cannot be resumed"):
                saf(tmp_path, resume=True, history_dtype=torch.int8)
    path.write_bytes(whole)
    saf(tmp_path, resume=True, history_dtype=torch.int8)


def test_missing_and_unreadable_files_are_refused(tmp_path):
    left_by_a_run(tmp_path)
    (tmp_path / "tags.bin").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"tags\.bin cannot be opened \(No such file"):
        saf(tmp_path, resume=True)
    assert not (tmp_path / "tags.bin").exists()
    (tmp_path / "tags.bin").mkdir()
    with pytest.raises(ValueError, match=r"tags\.bin cannot be opened \(Is a directory"):
        saf(tmp_path, resume=True)


def test_files_of_another_run_are_refused(tmp_path):
    checkpoint = left_by_a_run(tmp_path / "one", save_history=False)
    left_by_a_run(tmp_path / "other", save_history=False)
    with pytest.raises(ValueError, match="other holds the history of another run than the checkpoint's"):
        saf(tmp_path / "other", resume=True, save_history=False).load_state_dict(checkpoint)
    lazily = SAF(N, C, lag=2, storage=tmp_path / "other", resume=True, save_history=False)
    lazily.load_state_dict(checkpoint)
    with pytest.raises(ValueError, match="another run than the checkpoint's"):
        step(lazily, 4)
    gc.collect()
    saf(tmp_path / "one", resume=True, save_history=False).load_state_dict(checkpoint)


def test_a_run_that_ended_after_its_checkpoint_goes_on_from_it(tmp_path):
    """It has recorded more by then, into a slot whose checksum it has dropped."""
    whole = saf(tmp_path / "whole")
    wanted = [step(whole, epoch) for epoch in range(1, 6)]
    checkpoint = left_by_a_run(tmp_path / "cut", save_history=False)
    later = saf(tmp_path / "cut", resume=True, save_history=False)
    later.load_state_dict(checkpoint)
    step(later, 4)
    assert set(json.loads((tmp_path / "cut" / "history.json").read_text())["checksums"]) == {"0", "2"}
    del later
    resumed = saf(tmp_path / "cut", resume=True, save_history=False)
    resumed.load_state_dict(checkpoint)
    assert torch.equal(step(resumed, 5), wanted[4])


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoryError, match="does not fit on"):
        saf(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    monkeypatch.delattr(os, "posix_fallocate")
    loss = saf(tmp_path)
    step(loss, 1)
    assert all(
        (tmp_path / name).stat().st_blocks * 512 >= (tmp_path / name).stat().st_size for name in ("records.bin",)
    )


HOLD = """
import sys, time, torch
from fastsam import SAF
loss = SAF(40, 8, lag=2, storage=sys.argv[1], device="cpu")
print("holds", flush=True)
time.sleep(60)
"""


def test_a_directory_has_one_run_at_a_time_and_a_dead_ones_lock_is_taken_over(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        try:
            assert other.stdout.readline() == "holds\n"
            with pytest.raises(RuntimeError, match=f"in use by another history \\(process {other.pid} on"):
                saf(tmp_path, resume=True)
        finally:
            other.kill()
    ours = saf(tmp_path, resume=True)
    with pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
        saf(tmp_path, resume=True)
    del ours
    saf(tmp_path, resume=True)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))], ids=["copy", "pickle"])
def test_a_copys_records_are_in_memory(tmp_path, way):
    loss = saf(tmp_path)
    step(loss, 1)
    other = way(loss)
    before = (tmp_path / "records.bin").read_bytes()
    step(other, 2)
    assert (tmp_path / "records.bin").read_bytes() == before
    step(loss, 2)
    assert torch.equal(step(other, 3), step(loss, 3))


def test_a_slot_is_read_for_its_checksum_once(tmp_path, monkeypatch):
    import fastsam.trajectory.files as files

    read, crc = [], files._crc
    monkeypatch.setattr(files, "_crc", lambda tensor: read.append(1) or crc(tensor))
    loss = saf(tmp_path)
    step(loss, 1)
    loss.state_dict()
    assert len(read) == 6  # tags and records of all slots
    loss.state_dict()
    assert len(read) == 6
    step(loss, 2)
    loss.state_dict()
    assert len(read) == 8


def test_records_of_earlier_versions_are_taken_over(tmp_path):
    """They had `lag` slots, in which epoch e and epoch e - lag shared one."""
    now = saf(tmp_path)
    for epoch in (1, 2, 3):
        step(now, epoch)
    state = copy.deepcopy(now.state_dict())
    kept = state["_extra_state"]["history"]
    # of epochs 2 and 3, at their numbers mod 2
    state["_extra_state"]["history"] = {name: torch.stack([field[2], field[0]]) for name, field in kept.items()}
    del state["_extra_state"]["run"]
    later = SAF(N, C, lag=2, start_epoch=1, device="cpu")
    later.load_state_dict(state)
    assert torch.equal(step(later, 4), step(now, 4))
    assert torch.equal(step(later, 5), step(now, 5))
