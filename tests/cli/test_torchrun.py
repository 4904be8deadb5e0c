"""`torchrun -m fastsam train`: every method with two processes, one voice, one set of files, and resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsam.methods import METHODS

pytestmark = pytest.mark.xdist_group("torchrun")
WORKER = Path(__file__).with_name("torchrun_worker.py")


def torchrun(*arguments, **keywords):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("TRITON_INTERPRET", None)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240, **keywords)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("torchrun")
    done = torchrun(str(WORKER), str(out), cwd=WORKER.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(runs, method):
    out, said = runs
    result = json.loads((out / method / "result.json").read_text())
    assert result["last_test_accuracy"] > 80
    assert result["config"]["ranks"] == 2
    assert said.count(f"cnn, {method}") == 1  # the first process alone speaks


def test_an_interrupted_run_resumes_bit_for_bit(runs):
    out, _ = runs
    assert (out / "broken" / "checkpoint.pt").exists()


def test_bad_input_is_told(tmp_path):
    done = torchrun("-m", "fastsam", "train", "--batch-size", "63", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode != 0
    assert "fastsam: batch size 63 cannot be cut into equal parts for 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_of_two_processes_is_not_resumed_by_one(runs):
    out, _ = runs
    line = [sys.executable, "-m", "fastsam", "train", "--resume", "--out", str(out / "sgd")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot be resumed with ranks 1 (it has 2)" in done.stderr
