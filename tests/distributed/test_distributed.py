"""Training on several processes, on the CPU over gloo: the cases are in distributed_worker*.py.

Two launches run all of them, since a process needs seconds to start. A case that fails ends its launch: ranks may wait
for each other in different places then.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import distributed_worker_msam  # noqa: F401
import distributed_worker_saf  # noqa: F401
import pytest
import torch
from distributed_worker_fsdp import load_into_one_process, save_from_one_process, whole_run
from problems import assert_same, batches, losses_of, mlp, snapshot

from fastsam import SAM

WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(world, folder, *stop):
    """Start all ranks and wait for them; what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command, pipes = [sys.executable, WORKER], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), str(port), folder, *stop], env=environment, **pipes)
        for rank in range(world)
    ]
    return [rank.communicate(timeout=240)[0] for rank in ranks]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Runs the cases of a world once, and reads what came of one of them."""
    printed = {}
    folder = tmp_path_factory.mktemp("outcomes")

    def outcome(world, case):
        if world not in printed:
            if world == 2:
                save_from_one_process(folder)
            printed[world] = launch(world, folder)
        files = [folder / f"{case}.{rank}" for rank in range(world)]
        texts = [
            f.read_text() if f.exists() else f"not run:\n{out}" for f, out in zip(files, printed[world], strict=True)
        ]
        return folder, texts

    return outcome


def parameters(world):
    return [pytest.param(world, case, id=f"{world} ranks {case}") for case in distributed_worker.CASES[world]]


@pytest.mark.parametrize(("world", "case"), parameters(2) + parameters(4))
def test_on_all_ranks(outcomes, world, case):
    _, texts = outcomes(world, case)
    assert texts == ["passed"] * world, "\n".join(texts)


def test_checkpoint_of_two_processes_continues_on_one(outcomes):
    folder, texts = outcomes(2, "checkpoint_from_two_processes")
    assert texts == ["passed"] * 2
    model, expected = load_into_one_process(folder), whole_run()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("stop", "reason"),
    [("a_rank_dies", "ZeroDivisionError: rank 1's own mistake"), ("a_rank_lags", "fastsam could not reduce")],
)
def test_every_rank_has_an_error_soon_after_one_stops(tmp_path, stop, reason):
    started = time.monotonic()
    printed = launch(2, tmp_path, stop)
    assert "fastsam could not reduce the ascent gradient on rank 0: another rank has stopped" in printed[0]
    assert reason in printed[1]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("bad", ["local", 0, -2, True, None, 1.5])
def test_unknown_perturb_sync_is_refused(bad):
    with pytest.raises(ValueError, match="perturb_sync must be 'global', 'replica' or a number of ranks"):
        SAM(mlp().parameters(), torch.optim.SGD, perturb_sync=bad, lr=0.1)


def test_one_process_is_one_replica():
    expected, model = mlp(), mlp()
    alone = SAM(expected.parameters(), torch.optim.SGD, lr=0.1)
    opt = SAM(model.parameters(), torch.optim.SGD, perturb_sync="replica", model=model, lr=0.1)
    for x, y in batches(3):
        alone.step(losses_of(expected), x, y)
        opt.step(losses_of(model), x, y)
    assert_same(model, snapshot(expected))
    with pytest.raises(ValueError, match="does not divide the 1 ranks"):
        SAM(model.parameters(), torch.optim.SGD, perturb_sync=2, lr=0.1)


def test_dtensor_is_not_imported_where_nobody_uses_it():
    program = "import sys, fastsam; print('torch.distributed.tensor' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"
