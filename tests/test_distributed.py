"""Training on several processes, on the CPU over gloo: the cases are in distributed_worker*.py.

Two launches run all of them, since a process needs seconds to start. A case that fails ends its launch: ranks may wait
for each other in different places then.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
import distributed_worker_ddp  # isort: skip  # noqa: F401
import distributed_worker_fsdp  # isort: skip

WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(world, folder, *cases):
    """Start all ranks and wait for them; what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(world), str(port), folder, *cases],
            env=environment, cwd=WORKER.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
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
                distributed_worker_fsdp.save_from_one_process(folder)
            printed[world] = launch(world, folder)
        files = [folder / f"{case}.{rank}" for rank in range(world)]
        texts = [f.read_text() if f.exists() else f"not run:\n{out}" for f, out in zip(files, printed[world], strict=True)]
        return folder, texts

    return outcome


def parameters(world):
    return [pytest.param(world, case, id=f"{world} ranks {case}") for case in distributed_worker.CASES[world]]


# one test would do, but a report by case says more
@pytest.mark.parametrize(("world", "case"), parameters(2) + parameters(4))
def test_on_all_ranks(outcomes, world, case):
    _, texts = outcomes(world, case)
    assert texts == ["passed"] * world, "\n".join(texts)
