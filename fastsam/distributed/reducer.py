"""Modules whose gradients DistributedDataParallel reduces while a backward runs, and how one backward is left out."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.distributed.dtensor import is_dtensor, loaded

_REPLICATE = "torch.distributed._composable.replicate"


class Reducer:
    """A `DistributedDataParallel` module, or the one that the composable `replicate()` keeps for a module.

    Args:
        ddp: the module that reduces.
        replicated: the state of `replicate()`, which sets DDP's switch anew in every forward; None for DDP itself.
    """

    def __init__(self, ddp: DistributedDataParallel, replicated: Any = None) -> None:
        self.ddp, self._replicated = ddp, replicated
        self._reduction: _Reduction | None = None

    @property
    def is_switched_off(self) -> bool:
        """Whether somebody has told it to leave gradients unreduced: DDP's no_sync(), or the like."""
        if self._replicated is not None:
            return self._replicated._no_sync
        return not self.ddp.require_backward_grad_sync

    @property
    def left_unreduced(self) -> bool:
        """Whether its last forward left gradients unreduced, or ran without gradients."""
        return not self.ddp.require_forward_param_sync

    def left_out(self) -> AbstractContextManager[None]:
        """Context in which forwards and backwards leave this rank's own gradients.

        Raises:
            RuntimeError: the module was built with static_graph=True, and has a communication hook already.
        """
        if self.ddp.static_graph:
            if self._reduction is None:
                self._reduction = _Reduction(self.ddp)
            return self._reduction.left_out()
        return self.ddp.no_sync() if self._replicated is None else _switched_off(self._replicated)


def reducers_of(modules: Sequence[nn.Module]) -> list[Reducer]:
    """Return what reduces gradients in these modules.

    What `replicate()` puts off until the first forward it does now, on all ranks together.

    Raises:
        ValueError: a module is replicated whose weights are DTensors.
    """
    found = [Reducer(m) for m in modules if isinstance(m, DistributedDataParallel)]
    for module in modules:
        if isinstance(module, loaded(_REPLICATE, "DDP")):
            state = sys.modules[_REPLICATE].replicate.state(module)
            if not state.has_initialized:
                _refuse_dtensors(module)
                state.lazy_init()
            found.append(Reducer(state._ddp, state))
    return found


def _refuse_dtensors(module: nn.Module) -> None:
    for p in module.parameters():
        if is_dtensor(p):
            raise ValueError(
                f"replicate() turns a tensor parallel weight of shape {tuple(p.shape)} into this rank's part, of whose "
                "norm alone every rank would perturb; use torch.distributed.fsdp.fully_shard (FSDP2) over the ranks "
                "that hold copies"
            )


@contextmanager
def _switched_off(replicated: Any) -> Iterator[None]:
    before, replicated._no_sync = replicated._no_sync, True
    try:
        yield
    finally:
        replicated._no_sync = before


class _Reduction:
    """DDP's mean over ranks as a communication hook that can leave it out, since a static graph refuses no_sync()."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.is_left_out, self.group = False, ddp.process_group
        try:
            ddp.register_comm_hook(self, _reduce)
        except RuntimeError as error:
            raise RuntimeError(
                "DistributedDataParallel(static_graph=True) leaves its reduction out by a communication hook, but has "
                "one already; drop static_graph, or that hook"
            ) from error

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Leave gradients as they are on each rank."""
        self.is_left_out = True
        try:
            yield
        finally:
            self.is_left_out = False


def _reduce(reduction: _Reduction, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    gradients = bucket.buffer()
    if reduction.is_left_out:
        done: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[gradients.device] if gradients.is_cuda else None
        )
        done.set_result(gradients)
        return done
    gradients.div_(dist.get_world_size(reduction.group))
    work = dist.all_reduce(gradients, group=reduction.group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
