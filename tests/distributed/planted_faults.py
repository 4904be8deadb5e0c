"""Tests with planted faults, which test_ranks.py runs in a session of their own."""

import fcntl
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

pytestmark = pytest.mark.ranks(2)


@pytest.fixture(scope="session")
def ranks_of():
    with Ranks(2, patience=20) as ranks:
        yield lambda world: ranks


def hang():
    while True:
        time.sleep(0.1)


def lock_and_hang(folder):
    """Each rank holds a lock on a file of its own for as long as it runs."""
    with (folder / f"rank {dist.get_rank()}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        dist.barrier()
        (folder / f"locked {dist.get_rank()}").touch()
        hang()


@pytest.mark.parametrize("number", [1, 2])
def test_passes(number):
    total = torch.full((1,), float(number))
    dist.all_reduce(total)
    assert total.item() == 2 * number
    assert dist.get_world_size() == 2


def test_fails():
    assert dist.get_rank() == 0, "rank 1's own mistake"
    dist.barrier()


def test_passes_after_a_failure():
    dist.barrier()


def test_hangs():
    if dist.get_rank() == 1:
        hang()


def test_passes_after_a_hang():
    dist.barrier()


def test_dies():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_passes_after_a_death():
    dist.barrier()


def test_cannot_be_sent(ranks_of):
    """A function inside a function cannot be pickled."""


def test_passes_in_the_end():
    dist.barrier()
