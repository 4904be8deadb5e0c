"""Checkpoints that earlier versions wrote go on to resume, and lead to the weights that they led to then."""

from pathlib import Path

import pytest
import torch
from old_runs import RUNS, Run

FILE = Path(__file__).parents[1] / "data" / "checkpoints_before_the_rooms.pt"


@pytest.fixture(scope="module")
def written():
    return torch.load(FILE, weights_only=True)


@pytest.mark.parametrize("name", RUNS)
def test_resumes(written, name, choose):
    choose("torch")
    run = Run(name)
    run.load(written["runs"][name]["checkpoint"])
    run.train()
    # matrix products add up in another order on another processor
    same = written["processor"] == torch.backends.cpu.get_cpu_capability()
    for key, expected in written["runs"][name]["after"].items():
        found = run.model.state_dict()[key]
        assert torch.equal(found, expected) if same else torch.allclose(found, expected, rtol=0, atol=1e-12), key
