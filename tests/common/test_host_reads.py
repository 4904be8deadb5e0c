"""The law of host reads: no step waits for the device."""

import pytest
import torch
from host_reads import NoHostReads
from laws import law, takes_plain_steps
from problems import largest_difference
from training import Training

from fastsam import SAF
from fastsam.kernels import reference_common


@pytest.fixture
def as_on_a_device(monkeypatch):
    """What the CPU's reference reads, ids that are checked there and masks that are drawn there are the CPU's alone."""
    monkeypatch.setattr(reference_common, "READ_SCALARS", False)
    monkeypatch.setattr(SAF, "_check_ids", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: t.numpy().tolist())


SKIPS = {
    "a foreign base cannot skip a step on the device": lambda cell: cell.base == "rmsprop",
    "torch's AdamW reads its counter on the host": lambda cell: takes_plain_steps(cell) and cell.base == "adamw",
    "strict=True waits for the device, and says so": lambda cell: cell.subject.variant == "strict",
    "records on the host are fetched from there": lambda cell: cell.subject.variant == "on the host",
}


@law(skips=SKIPS, backends=("torch", "triton"))
def test_a_step_reads_nothing_on_the_host(cell, as_on_a_device):
    training, expected = Training(cell), Training(cell).train(3)
    for _ in range(3):  # after which LookSAM has taken both kinds of steps, and SAF and MESA have heard the past
        with NoHostReads():
            training.step()
    assert largest_difference(training.model, expected.model) < 1e-12


def test_the_check_can_fail():
    with pytest.raises(AssertionError, match="host sync"), NoHostReads():
        torch.ones(()).item()
