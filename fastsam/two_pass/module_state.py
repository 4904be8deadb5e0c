"""Module state: what forwards move beside gradients, of which a step keeps what its first pass makes.

Every forward of a step starts from the state that the step found, and the step ends with what its first pass left.
State is every buffer, by reference and by value: running statistics, spectral norm's vectors, codebooks, queues,
observers; frozen parameters that a forward moves, such as a momentum encoder's; and what the user names.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fastsam.two_pass import capture
from fastsam.two_pass.snapshot import Slot, Snapshot, checksum, slots_of

Modules = nn.Module | Sequence[nn.Module] | None
"""What `model=` takes."""
SEARCHED_EVERY = 256
"""Steps from one search for frozen parameters that a forward moves to the next; each reads them twice, and waits."""
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class ModuleState:
    """Keeps the state of modules to one forward of a step.

    Args:
        modules: whose state it is; walked anew in every step, since layers are added, converted and replaced.
        keep: what no walk finds: tensors, and objects with state_dict() and load_state_dict().
        merges: says whether the running statistics of several pairs in a step become their mean.
    """

    def __init__(
        self, modules: Sequence[nn.Module] = (), keep: Sequence[Any] = (), merges: Callable[[], bool] = bool
    ) -> None:
        self._modules, self._merges = modules, merges
        self._kept_tensors = [k for k in keep if isinstance(k, Tensor)]
        self._kept_objects = [k for k in keep if not isinstance(k, Tensor)]
        self._frozen = _MovingFrozen(self._kept_tensors)
        self._before_step, self._before_pair, self._after_first = Snapshot(), Snapshot(), Snapshot()
        self._expected = Snapshot()
        # what the first pass of the last pair found
        self._found = self._before_step
        self._mean: MeanUpdate | None = None
        self._share = 1.0

    # a step

    def begin(self, share: float = 1.0, is_only: bool = False) -> None:
        """Save what the first pass of a pair finds; of a step's first pair that is what a failure goes back to.

        Args:
            share: what the pair's running statistics count among those of all pairs of the step.
            is_only: whether no further pass follows in the pair.
        """
        self._expected.drop()
        self._after_first.drop()
        if self._before_step.is_taken:
            self._merge_last_pair()
            self._found = self._before_pair
        else:
            if not is_only:
                self._frozen.begin(self._modules)
            self._found = self._before_step
        self._share = share
        self._take(self._found)

    def hold(self) -> None:
        """Save what a failure goes back to, where the step's pairs have not done so or `restore()` has let it go."""
        if not self._before_step.is_taken:
            self._take(self._before_step)

    def turn(self) -> None:
        """Save what the first pass has left, and go back to what it found, for a forward of the second pass."""
        if not self._found.is_taken:
            # the first pass was no pass of ours
            self._found = self._expected
        self._frozen.end()
        self._take(self._after_first)
        replaced = self._found.put_back()
        if replaced and capture.recorder() is not None:
            raise RuntimeError(
                f"the step cannot be captured: a forward puts another tensor in the place of {replaced[0].key!r}, "
                "which no replay does; change it in place, as by copy_(), or take the steps without graph_step"
            )

    def replay(self) -> None:
        """Go back to what the first pass found, for one more forward. Idempotent."""
        self._found.put_back()

    def put_back(self) -> None:
        """Leave what the first pass left, whatever later ones have done. Idempotent."""
        self._after_first.put_back()

    def merge_pairs(self) -> None:
        """Make one update of running statistics out of those of the step's pairs, where the method merges them."""
        if self._mean is not None:
            self._mean.add(self._share)
            self._mean.finish()
            self._mean = None

    def rewind(self) -> None:
        """Go back to what the step found. Idempotent."""
        self.put_back()
        self._before_step.put_back()
        self._expected.drop()
        self._frozen.cancel()
        self.end()

    def end(self) -> None:
        """Let the state be what it is."""
        for snapshot in (self._before_step, self._before_pair, self._after_first):
            snapshot.drop()
        self._found, self._mean = self._before_step, None

    def expect(self, another: bool) -> None:
        """Save what the next step finds, where its first pass will begin without a call of ours; else forget it."""
        self._expected.drop()
        if another:
            self._frozen.begin(self._modules)
            self._take(self._expected)

    def _merge_last_pair(self) -> None:
        if not self._merges():
            return
        if self._mean is None:
            statistics = self.statistics()
            self._mean = MeanUpdate(statistics, [self._before_step.value_of(b) for b in statistics])
        self._mean.add(self._share)

    def _take(self, snapshot: Snapshot) -> None:
        kept = [Slot(self._kept_tensors, i) for i in range(len(self._kept_tensors))]
        snapshot.take(slots_of(walk(self._modules), "_buffers") + kept + self._frozen.slots, self._kept_objects)

    # what there is

    def statistics(self) -> list[Tensor]:
        """Return the running statistics, and their counters, that a forward in training mode would move now."""
        layers = [m for m in walk(self._modules) if m.training and _tracks_statistics(m)]
        return [b for m in layers for name, b in m._buffers.items() if name in _STATISTICS and b is not None]

    def any_training(self) -> bool:
        """Whether a layer normalizes by the statistics of its batch, which takes two rows."""
        batch_norms = (m for m in walk(self._modules) if isinstance(m, _BatchNorm))
        return any(m.training or m.running_mean is None for m in batch_norms)

    def any_cumulative(self) -> bool:
        """Whether a layer would move its statistics by how many batches it has seen (momentum=None)."""
        layers = (m for m in walk(self._modules) if isinstance(m, _NormBase))
        return any(m.training and m.track_running_stats and m.momentum is None for m in layers)


class _MovingFrozen:
    """Finds the frozen parameters that a forward moves, without a copy of all frozen ones in every step.

    In some steps their checksums before and after the first pass are compared: in the first four, since a momentum
    encoder that begins as a copy does not move before the weights do; then in the 8th, 16th and so on; and in every
    256th.

    Args:
        kept: tensors that need no search.
    """

    def __init__(self, kept: Sequence[Tensor]) -> None:
        self.slots: list[Slot] = []
        """Those that were found; in a search all that may be found, where these are few enough to be copied."""
        self._kept = {id(t) for t in kept}
        self._found: list[Slot] = []
        self._suspects: list[Slot] = []
        self._checksums: list[Tensor] = []
        self._steps = self._last_search = 0

    def begin(self, modules: Sequence[nn.Module]) -> None:
        """Search in this step, if it is time."""
        self.cancel()
        self._steps += 1
        n = self._steps
        if not (n <= 4 or n & (n - 1) == 0 or n % SEARCHED_EVERY == 0) or capture.current() is not None:
            return
        parameters = [slot for slot in slots_of(walk(modules), "_parameters") if slot.held is not None]
        known = self._kept | {id(slot.held) for slot in self._found}
        self._suspects = [s for s in parameters if not s.held.requires_grad and id(s.held) not in known]
        self._checksums = [checksum(slot.held) for slot in self._suspects]
        trained = sum(slot.held.nbytes for slot in parameters if slot.held.requires_grad)
        # A momentum encoder is as large as what is trained, a frozen backbone may be a thousand times as large.
        if sum(slot.held.nbytes for slot in self._suspects) <= 2 * trained:
            self.slots = self._found + self._suspects

    def end(self) -> None:
        """Compare after the first pass.

        Raises:
            RuntimeError: a parameter has moved, of which there was no room for a copy.
        """
        if not self._suspects:
            return
        changes = [checksum(s.held) != before for s, before in zip(self._suspects, self._checksums, strict=True)]
        moved = torch.stack([change.cpu() for change in changes]).tolist()
        found = [slot for slot, has_moved in zip(self._suspects, moved, strict=True) if has_moved]
        was_copied = len(self.slots) > len(self._found)
        self.slots, self._suspects = self._found, []
        if found and not was_copied:
            raise RuntimeError(
                f"a forward moves the frozen parameter {found[0].key!r} of shape {tuple(found[0].held.shape)}, so that "
                "the second pass would start from another state than the first; pass the frozen parameters that move "
                f"as keep=[...], {len(found)} of them; with so many that do not move none is copied unasked"
            )
        if found and self._steps - self._last_search > 1:
            warnings.warn(
                f"a forward moves the frozen parameter {found[0].key!r}, and may have moved it since the search "
                f"{self._steps - self._last_search} steps ago; it is kept to one forward of a step from now on. Pass "
                "it as keep=[...] to be sure from the start",
                stacklevel=2,
            )
        self._last_search = self._steps
        self._found = self.slots = self._found + found

    def cancel(self) -> None:
        """Give up a search, if there is one, and count its step as none."""
        if self._suspects:
            self._steps -= 1
        self.slots, self._suspects = self._found, []


def modules_of(model: Any) -> list[nn.Module]:
    """Return the modules that `model=` names.

    Raises:
        TypeError: it is neither a module nor a sequence of modules.
    """
    if model is None or isinstance(model, nn.Module):
        return [] if model is None else [model]
    if not isinstance(model, (list, tuple)) or not all(isinstance(m, nn.Module) for m in model):
        kinds = ", ".join(type(m).__name__ for m in model) if isinstance(model, (list, tuple)) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module or a sequence of them, got {kinds}")
    return list(model)


def as_one(model: Modules) -> nn.Module | None:
    """Return one module that holds all that `model=` names; None for none."""
    modules = modules_of(model)
    return modules[0] if len(modules) == 1 else nn.ModuleList(modules) if modules else None


def check_keep(keep: Any) -> None:
    """Raise TypeError unless this is a sequence of tensors and of objects with a state."""
    if not isinstance(keep, (list, tuple)):
        raise TypeError(f"keep must be a list or tuple, got {type(keep).__name__}")
    for thing in keep:
        if not isinstance(thing, Tensor) and not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
            raise TypeError(
                f"keep takes tensors, and objects with state_dict() and load_state_dict(), got {type(thing).__name__}"
            )


def walk(roots: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield all modules once, but for those that keep their state to one pass themselves, as `fastsam.SAF` does."""
    seen: set[int] = set()
    waiting: list[Any] = list(roots)
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen or getattr(type(module), "keeps_own_state", False):
            continue
        seen.add(id(module))
        yield module
        waiting += module._modules.values()


def _tracks_statistics(module: nn.Module) -> bool:
    """Whether there are running statistics: of torch's layers, and by their names of scripted and other ones."""
    if isinstance(module, _NormBase):
        return module.track_running_stats
    return "running_mean" in module._buffers and "running_var" in module._buffers


class MeanUpdate:
    """Makes one update of running statistics out of several forward passes, all of which start from the same ones.

    A running statistic is linear in that of the batch, r <- (1 - mu) r + mu s. So the mean of what the passes leave is
    one update with the mean of their s, whatever mu is (momentum=None too), and no layer has to be asked for its s.
    What no pass moves, as a frozen layer's, stays what it is to the last bit.

    Args:
        buffers: statistics, and integer counters, which count the one update.
        start: what they held before the first pass; stays as it is.
    """

    def __init__(self, buffers: Sequence[Tensor], start: Sequence[Tensor]) -> None:
        pairs = list(zip(buffers, start, strict=True))
        self._statistics, self._start = _split_pairs([(b, s) for b, s in pairs if b.is_floating_point()])
        self._counters, self._count_start = _split_pairs([(b, s) for b, s in pairs if not b.is_floating_point()])
        # 16 bits are too few for a sum
        self._means = [torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32)) for b in self._statistics]
        self._moves = [torch.zeros_like(mean) for mean in self._means]
        self._counts = [torch.zeros_like(c) for c in self._counters]
        self._weights = 0.0

    @torch.no_grad()
    def add(self, weight: float) -> None:
        """Take in what a pass has left, and go back to the start for the next one."""
        if self._statistics:
            left = _as(self._statistics, self._means)
            torch._foreach_add_(self._means, left, alpha=weight)
            moves = torch._foreach_sub(left, _as(self._start, self._means))
            torch._foreach_add_(self._moves, torch._foreach_abs(moves))
        if self._counters:
            # Not every pass runs every layer.
            torch._foreach_maximum_(self._counts, self._counters)
        self._weights += weight
        self._set(self._start, self._count_start)

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the mean in the buffers."""
        if abs(self._weights - 1) > 1e-9 and self._means:
            torch._foreach_div_(self._means, self._weights)
        rows = zip(self._moves, self._start, self._means, strict=True)
        self._set([torch.where(moves == 0, start, mean) for moves, start, mean in rows], self._counts)

    def _set(self, statistics: list[Tensor], counters: list[Tensor]) -> None:
        _copy_all(self._statistics, statistics)
        _copy_all(self._counters, counters)


def _split_pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [b for b, _ in pairs], [s for _, s in pairs]


def _as(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    return [t.to(other.dtype) for t, other in zip(tensors, like, strict=True)]


def set_to_means(buffers: list[Tensor], stacked: list[Tensor]) -> None:
    """Set statistics to the means of their stacks over the first dimension, and counters to the largest."""
    _copy_all(buffers, [s.mean(0) if s.is_floating_point() else s.amax(0) for s in stacked])


@torch.no_grad()
def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
