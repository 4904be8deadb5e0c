"""Several processes on one run, as `torchrun` starts them: who this one is, and what they tell each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Return how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


@contextmanager
def together(device: str) -> Iterator[None]:
    """Join the other processes, each with a GPU of its own on "cuda"; nothing where there are none, or all have met."""
    if count() == 1 or dist.is_initialized():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        dist.barrier()


def total(numbers: Tensor) -> Tensor:
    """Return the sum over all processes."""
    if count() > 1:
        dist.all_reduce(numbers)
    return numbers


def of_first(value: Any) -> Any:
    """Return the first process's value."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: Any) -> list[Any]:
    """Return the values of all processes in the first one; an empty list in the others."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count() if is_first() else []
    dist.gather_object(value, values if is_first() else None, dst=0)
    return values
