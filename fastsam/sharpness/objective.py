"""The mean loss of a loader's samples as a function of the weights, and a model that is left as it was."""

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsam.arguments import LARGEST_INTEGER, check_choice, check_integer
from fastsam.distributed.dtensor import is_dtensor
from fastsam.two_pass.batch import Batch, read_batch, replace_tensors, tensors_of
from fastsam.two_pass.forward_alone import ForwardAlone
from fastsam.two_pass.loss_function import check_losses
from fastsam.two_pass.losses import Losses
from fastsam.two_pass.module_state import Modules, modules_of
from fastsam.two_pass.rng import RandomState
from fastsam.two_pass.snapshot import Snapshot, slots_of

Progress = Callable[[int, int | None], None]
"""Is called with how many units of work are done, and how many there are, or None where that is not known."""
Mode = Literal["eval", "train"]
_SAME_LOSS = 1e-4
"""Relative difference up to which two evaluations of a loss are the same computation, in another order on a GPU."""


@dataclass(frozen=True)
class How:
    """What all measures have in common; their docstrings explain each."""

    mode: Mode = "eval"
    seed: int = 0
    sharded: bool | None = None
    progress: Progress | None = None


class Objective:
    """The mean of the losses of all samples in a loader, as a function of the parameters with requires_grad=True.

    Args:
        model: the module, or a sequence of them; DistributedDataParallel's wrappers among them.
        loss_fn: as `opt.step` takes it: returns per-sample losses of shape [n], without backward.
        loader: iterable of batches that can be walked repeatedly. A tuple or list is the loss function's arguments,
            anything else its one argument. Tensors are moved to the first parameter's device.
        how: mode of the modules, seed, sharding and progress.

    Raises:
        TypeError: the model is no module, or the loader can be walked but once.
        ValueError: no parameter requires a gradient, one is sharded, or `how` has a bad value.
    """

    def __init__(self, model: Modules, loss_fn: Callable[..., Tensor], loader: Iterable[Any], how: How) -> None:
        self.roots, self.loss_fn, self.loader, self.how = modules_of(model), loss_fn, loader, how
        self.modules = list(nn.ModuleList(self.roots).modules())[1:]
        self.params = [p for p in nn.ModuleList(self.roots).parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("no parameter of the model requires a gradient; there is no direction to look into")
        if sharded := [p for p in self.params if is_dtensor(p)]:
            raise ValueError(
                f"a weight of shape {tuple(sharded[0].shape)} is a DTensor; load the full state dict into a model of "
                "whole tensors, and measure that"
            )
        check_choice("mode", how.mode, ("eval", "train"))
        check_integer("seed", how.seed, 0, LARGEST_INTEGER)
        if isinstance(loader, Iterator):
            raise TypeError(f"the loader is a {type(loader).__name__}, which can be walked but once; pass a list of it")
        self.device = self.params[0].device
        self.is_sharded = _is_sharded(loader, how.sharded)
        self.samples: int | None = None
        self._all_samples: float | None = None
        self._forward_alone, self._state = ForwardAlone(), Snapshot()
        self._draws: RandomState | None = None
        self._is_checked = False

    # keeping the model

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Context in which all is computed; at its end everything is what it was, after an exception too.

        That is: parameters and buffers, by reference and to the last bit, gradients, the modules' modes, and torch's,
        Python's and NumPy's random number generators and those of the loader.
        """
        with ExitStack() as stack:
            random_state = RandomState(_cuda_devices(), self._generators())
            # the last to be put back, since what comes before may draw
            stack.callback(random_state.set)
            slots = slots_of(self.modules, "_parameters")
            parameters = [slot.held for slot in slots if slot.held is not None]
            stack.callback(_put_back_grads, [(p, p.grad) for p in parameters])
            stack.callback(_put_back_modes, [(module, module.training) for module in self.modules])
            everything = Snapshot()
            everything.take(slots + slots_of(self.modules, "_buffers"))
            stack.callback(everything.put_back)
            for module in self.modules:
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(_bypassed(module))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for root in self.roots:
                root.train(self.how.mode == "train")
            self.keep_buffers()
            yield

    def keep_buffers(self) -> None:
        """Let the next forwards start from the buffers as they are now."""
        self._state.take(slots_of(self.modules, "_buffers"))

    def _generators(self) -> list[torch.Generator]:
        sampler = getattr(self.loader, "sampler", None)
        held = [getattr(thing, "generator", None) for thing in (self.loader, sampler)]
        return list({id(g): g for g in held if isinstance(g, torch.Generator)}.values())

    def _seed_all(self) -> None:
        """Let every pass over the loader draw the same numbers: its order, augmentations and dropout's masks."""
        seed = self.how.seed
        torch.default_generator.manual_seed(seed)
        for device in _cuda_devices():
            torch.cuda.default_generators[device.index].manual_seed(seed)
        for generator in self._generators():
            generator.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)

    # batches and losses

    def batches(self) -> Iterator[Batch]:
        """Yield the loader's batches, in every pass the same.

        Raises:
            ValueError: there is none.
            RuntimeError: the number of samples is another one than in the last pass.
        """
        self._seed_all()
        samples = 0
        for given in self.loader:
            arguments = tuple(given) if type(given) in (tuple, list) else (given,)
            batch = read_batch(self._on_device(arguments))
            samples += batch.n
            self._draws = RandomState(_cuda_devices())
            self._warn_if_random(batch)
            yield batch
        if samples == 0:
            raise ValueError("the loader has no data; pass one with at least one batch")
        if samples != (self.samples or samples):
            raise RuntimeError(
                f"the loader had {self.samples} samples in one pass and {samples} in another; a measure walks over it "
                "repeatedly, so pass one that gives the same samples each time"
            )
        self.samples = samples

    def _on_device(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        tensors = list(tensors_of(arguments, every=True))
        if all(t.device == self.device for t in tensors):
            return arguments
        return replace_tensors(arguments, [t.to(self.device) for t in tensors], every=True)

    def losses(self, batch: Batch) -> Tensor:
        """Return the losses of a batch, or of a part of the last one, shape [n], with a gradient.

        Every forward of a batch draws the same random numbers and starts from the buffers that the model came with.

        Raises:
            TypeError: the loss function returns something else than n losses.
            RuntimeError: the losses have no gradient.
        """
        return _unweighted(check_losses(self._call(batch), batch.n))

    def losses_alone(self, batch: Batch) -> Tensor:
        """Return what `losses` does where no backward follows."""
        losses = check_losses(self._forward_alone(lambda: self._call(batch)), batch.n, needs_grad=False)
        return _unweighted(losses).detach()

    def _call(self, batch: Batch) -> Any:
        assert self._draws is not None
        self._draws.set()
        if self.how.mode == "train":
            self._state.put_back()
        return batch.guarded(self.loss_fn)(*batch)

    def gradient_of(self, losses: Tensor, create_graph: bool = False) -> list[Tensor]:
        """Return the gradient of the sum of some losses, one tensor for each parameter; zeros where there is none.

        Raises:
            RuntimeError: no parameter has one.
        """
        found = torch.autograd.grad(losses.sum(), self.params, create_graph=create_graph, allow_unused=True)
        if all(grad is None for grad in found):
            raise RuntimeError("the losses depend on no parameter of the model; pass the model that loss_fn calls")
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(self.params, found, strict=True)]

    def _warn_if_random(self, batch: Batch) -> None:
        if self._is_checked:
            return
        self._is_checked = True
        first = self.losses_alone(batch)
        # from where the first one has left the generators
        second = self._forward_alone(lambda: batch.guarded(self.loss_fn)(*batch))
        if not torch.allclose(first, second, rtol=_SAME_LOSS, atol=_SAME_LOSS, equal_nan=True):
            warnings.warn(
                "two evaluations of the loss at the same weights differ: it draws random numbers, as dropout does. "
                f"What is measured is the loss under the draws of seed={self.how.seed}; switch the drawing off, as "
                "mode='eval' does for dropout",
                stacklevel=2,
            )

    # sums over the loader

    def total(self, sums: Tensor) -> Tensor:
        """Return the sum over all ranks that have a part of the data."""
        if self.is_sharded:
            dist.all_reduce(sums)
        return sums

    def all_samples(self) -> float:
        """Return how many samples all ranks have, after a pass over the loader."""
        if self._all_samples is None:
            own = torch.tensor(float(self.samples or 0), dtype=torch.float64, device=self.device)
            self._all_samples = float(self.total(own))
        return self._all_samples

    def loss(self) -> Tensor:
        """Return the mean loss, 0-dim float64."""
        sums = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.batches():
            sums += self.losses_alone(batch).double().sum()
        return self.total(sums) / self.all_samples()

    def gradient(self) -> list[Tensor]:
        """Return the gradient of the mean loss, one tensor for each parameter, at least float32."""
        sums = [torch.zeros_like(p, dtype=wide(p)) for p in self.params]
        for batch in self.batches():
            grads = self.gradient_of(self.losses(batch))
            torch._foreach_add_(sums, [g.to(s.dtype) for g, s in zip(grads, sums, strict=True)])
        samples = self.all_samples()
        return [self.total(s) / samples for s in sums]

    def report(self, done: int, total: int | None) -> None:
        """Tell the caller how far the work is."""
        if self.how.progress is not None:
            self.how.progress(done, total)


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums are taken in: float32 for 16 bits, else the tensor's own."""
    return torch.promote_types(tensor.dtype, torch.float32)


def count_batches(loader: Any) -> int | None:
    """Return the number of batches of a loader; None where it does not say."""
    try:
        return len(loader)
    except TypeError:
        return None


def _unweighted(losses: Losses) -> Tensor:
    """Return the losses of rows that all count the same, or raise TypeError."""
    if losses.weights is not None:
        raise TypeError(
            "measures take the mean over rows, but the loss function returned fastsam.Weighted; return one loss for "
            "each row, such as the mean over its tokens"
        )
    return losses.rows


def _is_sharded(loader: Any, sharded: bool | None) -> bool:
    """Whether each rank's loader has a part of the data: as the caller says, or as a distributed sampler tells."""
    is_running = dist.is_available() and dist.is_initialized()
    if sharded and not is_running:
        raise ValueError("sharded=True sums over ranks, but no process group runs; leave it out, or start one")
    if sharded is not None:
        return sharded
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return is_running and any(getattr(s, "num_replicas", 1) > 1 for s in samplers)


def _cuda_devices() -> Sequence[torch.device]:
    if not torch.cuda.is_initialized():
        return []
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _put_back_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, was_training in modes:
        module.training = was_training


def _put_back_grads(grads: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    for p, grad in grads:
        if p.grad is not grad:
            p.grad = grad


@contextmanager
def _bypassed(ddp: DistributedDataParallel) -> Iterator[None]:
    """Let a wrapper call its module alone: no reducer that waits for a backward, no buffers from the first rank."""
    ddp.__dict__["forward"] = ddp.module.__call__
    try:
        yield
    finally:
        del ddp.__dict__["forward"]
