"""One step of a training loop of one's own, held against the method's equations in plain torch."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam.distributed.dtensor import is_dtensor
from fastsam.testing.references import REFERENCES, PlainStep, base_alone
from fastsam.two_pass.batch import batch_size, read_batch, take_rows
from fastsam.two_pass.gradients import put, take
from fastsam.two_pass.loss_function import check_losses
from fastsam.two_pass.losses import Losses
from fastsam.two_pass.module_state import modules_of, walk
from fastsam.two_pass.optimizer import TwoPassOptimizer
from fastsam.two_pass.rng import RandomState
from fastsam.two_pass.snapshot import Slot, Snapshot, checksum, slots_of
from fastsam.two_pass.stage import Stage

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1, torch.complex64: 1e-3}


class StepReport(NamedTuple):
    """What `check_step` found.

    Attributes:
        gradient_error: relative distance of the final gradient from the reference's d, after `scale`; None where the
            loop has cleared it.
        weight_error: relative distance of the weights' change from that of the base optimizer's step with scale d.
        scale: what the final gradient is of d: 1, or less where the loop clips, averages or accumulates.
    """

    gradient_error: float | None
    weight_error: float
    scale: float


def check_step(
    opt: TwoPassOptimizer,
    losses: Callable[..., Any],
    *batch: Any,
    take_step: Callable[[], Any] | None = None,
    reference: Callable[[PlainStep], list[Tensor]] | None = None,
    rtol: float | None = None,
) -> StepReport:
    """Take one step and hold it against a reference of a few lines; everything is put back afterwards, on any outcome.

    What it holds: the loss function gives the same losses twice from the same weights, module state and random
    numbers; the step's final gradient is the method's d, or where `when=` or rho is 0 the plain gradient, and its
    weights are those of the base optimizer's step with d; weights are not perturbed when it is over; buffers and random
    generators end where one forward leaves them; and all ranks of a process group hold the same d. Losses that keep a
    memory of their own (SAF, MESA) are seen more often than in a step; check the loop with a plain loss.

    Args:
        opt: an optimizer of fastsam, between two steps. Of plain weights: DTensors are refused.
        losses: as for `opt.step`: returns per-sample losses, shape [n], without backward.
        batch: its arguments.
        take_step: the body of your loop for this batch, with whatever framework, scaler or clipping it has. Default:
            `opt.step(losses, *batch)`.
        reference: for an optimizer of your own: takes a `PlainStep` and returns d, one tensor for each parameter in
            group order. Those of fastsam's methods are known.
        rtol: largest relative error, of the 2-norm over all tensors. Default: 1e-8 for float64 weights, 1e-3 for
            float32, 0.1 for 16 bits.

    Returns:
        The errors found.

    Raises:
        AssertionError: the step breaks a promise; the message says which, why that happens, and what to do.
        TypeError: opt is no fastsam optimizer, or there is no reference for its class.
        ValueError: weights are DTensors.
        RuntimeError: a step is under way.
    """
    _check_arguments(opt, reference)
    rule = (reference or REFERENCES[type(opt)]) if opt.is_active else base_alone
    read, everything = read_batch(batch), _Everything(opt, losses)
    tolerance = rtol or max(_TOLERANCES.get(p.dtype, 1e-3) for p in everything.params)
    take_it = take_step or (lambda: opt.step(losses, *batch))
    with everything.put_back():
        looks = _Looks(opt, everything, read.guarded(losses))
        looks.refuse_changing_losses(read)
        everything.restore()
        d = rule(PlainStep(opt, read, looks, everything.opt._run.module_state.statistics))
        left = everything.now(), looks.draws
        everything.restore()
        plain = looks(read)[1] if not opt.needs_second_pass else _plain_gradient(opt, read, looks, everything)
        everything.restore()
        opt.zero_grad()
        take_it()
        return _Judge(opt, everything, d, plain, tolerance).verdict(*left)


def _check_arguments(opt: Any, reference: Any) -> None:
    if not isinstance(opt, TwoPassOptimizer):
        raise TypeError(f"opt must be an optimizer of fastsam, got {type(opt).__name__}")
    if reference is None and type(opt) not in REFERENCES:
        raise TypeError(f"there is no reference for {type(opt).__name__}; pass reference=")
    if any(is_dtensor(p) for group in opt.param_groups for p in group["params"]):
        raise ValueError("check_step compares whole weights, but these are sharded; check the loop on one process")
    opt._run.require("check_step()", Stage.IDLE)
    opt.check_groups()


class _Everything:
    """All that a step may change, and its values when this was made."""

    def __init__(self, opt: TwoPassOptimizer, losses: Callable[..., Any]) -> None:
        self.opt = opt
        self.params = [p for group in opt.param_groups for p in group["params"]]
        self.used = list(_modules_behind(losses))
        roots = [*modules_of(opt.model), *self.used]
        parameters = (slot for slot in slots_of(walk(roots), "_parameters") if slot.held is not None)
        self.slots = [*slots_of(walk(roots), "_buffers"), *parameters]
        kept = [k for k in opt.keep if isinstance(k, Tensor)]
        self.slots += [Slot(kept, i) for i in range(len(kept))] + [
            Slot(self.params, i) for i in range(len(self.params))
        ]
        self.names = [str(slot.key) for slot in self.slots]
        self._snapshot = Snapshot()
        self._snapshot.take(self.slots, [k for k in opt.keep if not isinstance(k, Tensor)])
        self._draws = RandomState({p.device for p in self.params}, opt.generators)
        self._grads = take(self.params), [None if p.grad is None else p.grad.clone() for p in self.params]
        self._groups = [dict(group) for group in opt.param_groups]
        self._state = {p: (dict(entries), copy.deepcopy(dict(entries))) for p, entries in opt.state.items()}
        self._run = {name: getattr(opt._run, name) for name in ("found_inf", "last_grad_norm", "perturbed_losses")}
        self._were_consumed = opt._run.consumed.covers(opt.param_groups), opt._run.consumed.zeroed
        self._skipped = opt._run.skipped.clone()

    def restore(self) -> None:
        """Put all of it back, but for what `now` and the like have returned."""
        self._snapshot.put_back()
        self._draws.set()
        for group, kept in zip(self.opt.param_groups, self._groups, strict=True):
            group.clear()
            group.update(kept)
        self.opt.state.clear()
        for p, (entries, values) in self._state.items():
            self.opt.state[p] = {name: _put_value(entries[name], values[name]) for name in entries}

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Context after which everything is as it was."""
        try:
            yield
        finally:
            if self.opt._run.stage is not Stage.IDLE:
                self.opt.restore()
            self.opt.zero_grad()
            self.restore()
            grads, values = self._grads
            with torch.no_grad():
                for grad, value in zip(grads, values, strict=True):
                    if grad is not None and value is not None:
                        grad.copy_(value)
            put(self.params, grads)
            for name, value in self._run.items():
                setattr(self.opt._run, name, value)
            consumed, zeroed = self._were_consumed
            self.opt._run.consumed.set(self.opt.param_groups if consumed else [], zeroed)
            self.opt._run.skipped.copy_(self._skipped)

    def now(self) -> list[Tensor | None]:
        """Return copies of what is in the slots."""
        return [None if slot.held is None else slot.held.detach().clone() for slot in self.slots]

    def weights(self) -> list[Tensor]:
        """Return copies of the optimizer's weights."""
        return [p.detach().clone() for p in self.params]


def _put_value(entry: Any, value: Any) -> Any:
    """Return the entry with the value that it had."""
    if not isinstance(entry, Tensor):
        return copy.deepcopy(value)
    with torch.no_grad():
        return entry.copy_(value)


class _Looks:
    """Losses and gradients at w + eps, on the live weights, which are put back: what a reference is given.

    A look at w goes on from the module state and the random numbers that the one before has left; one at w + eps starts
    from those that the last look at w found, and leaves no trace.
    """

    def __init__(self, opt: TwoPassOptimizer, everything: _Everything, losses: Callable[..., Any]) -> None:
        self._opt, self._all, self._losses = opt, everything, losses
        self._ranks = opt._find_ranks()
        self._found, self._left = Snapshot(), Snapshot()
        self.draws: RandomState = self._random_state()
        weights = {id(p) for p in everything.params}
        self._state = [slot for slot in everything.slots if id(slot.held) not in weights]

    def __call__(
        self,
        batch: tuple[Any, ...],
        eps: Sequence[Tensor] | None = None,
        rows: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> tuple[Losses, list[Tensor]]:
        weights = self._all.weights()
        if eps is None:
            self._found.take(self._state)
            self._start = self._random_state()
        else:
            self._left.take(self._state)
            self._found.put_back()
            self._start.set()
        with torch.no_grad():
            for p, e in zip(self._all.params, eps or [], strict=eps is not None):
                p.add_(e)
        losses, gradient = self._gradient(batch if rows is None else take_rows(batch, rows), chosen)
        with torch.no_grad():
            for p, w in zip(self._all.params, weights, strict=True):
                p.copy_(w)
        if eps is None:
            self.draws = self._random_state()
        else:
            self._left.put_back()
            self.draws.set()
        over_all = eps is not None or not self._opt.needs_second_pass
        mean = self._ranks.average_over_all if over_all else self._ranks.average
        if self._ranks.are_several:
            gradient = list(mean(self._all.params, gradient))  # type: ignore[arg-type]
        return losses, gradient

    def _gradient(self, batch: tuple[Any, ...], chosen: Tensor | None) -> tuple[Losses, list[Tensor]]:
        with torch.enable_grad(), self._ranks.no_sync():
            losses = check_losses(self._losses(*batch), batch_size(batch), may_be_scalar=not self._opt.needs_rows())
            mean = (losses if chosen is None else losses.take(chosen)).mean()
            wanted = [p for p in self._all.params if p.requires_grad]
            found = iter(torch.autograd.grad(mean, wanted, allow_unused=True))
        torch.clear_autocast_cache()
        gradient = [next(found) if p.requires_grad else None for p in self._all.params]
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in gradient]
        return losses.detach(), [
            torch.zeros_like(p) if g is None else g for p, g in zip(self._all.params, dense, strict=True)
        ]

    def _random_state(self) -> RandomState:
        return RandomState({p.device for p in self._all.params}, self._opt.generators)

    def refuse_changing_losses(self, batch: tuple[Any, ...]) -> None:
        """Raise AssertionError where the same weights, state and random numbers give other losses."""
        first = self(batch)[0].rows
        self._all.restore()
        again = self(batch)[0].rows
        if not torch.equal(first, again) and not torch.allclose(first, again, rtol=1e-4, equal_nan=True):
            raise AssertionError(
                "the loss function returns other losses from the same weights, buffers and random numbers, so that the "
                "passes of a step do not see the same function: it depends on something that a forward moves and "
                "nobody puts back. Name it: tensors and objects with a state in keep=, generators in generators="
            )


def _plain_gradient(opt: Any, batch: Any, looks: _Looks, everything: _Everything) -> list[Tensor]:
    """The gradient at w of the whole batch over all ranks, with which the base optimizer alone would step."""
    gradient = looks(batch)[1]
    if looks._ranks.are_several:
        gradient = list(looks._ranks.average_over_all(everything.params, gradient))  # type: ignore[arg-type]
    return gradient


class _Judge:
    """Compares a step that has just been taken with the reference's."""

    def __init__(
        self, opt: TwoPassOptimizer, everything: _Everything, d: list[Tensor], plain: list[Tensor], rtol: float
    ) -> None:
        self.opt, self.all, self.d, self.plain, self.rtol = opt, everything, d, plain, rtol

    def verdict(self, left: list[Tensor | None], draws: RandomState) -> StepReport:
        """Return the errors, or raise AssertionError with all promises that are broken."""
        if self.opt._run.stage is not Stage.IDLE:
            raise AssertionError(
                f"the step is not over: it is {self.opt._run.stage.value}; the loop leaves the second pass or step() "
                "out"
            )
        broken = [*self._state(left), *self._random(draws), *self._ranks()]
        weights, grads = self.all.weights(), take(self.all.params)
        gradient_error, scale = None, 1.0
        if any(g is not None for g in grads):
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.all.params, grads, strict=True)]
            gradient_error, scale = _compare(found, self.d)
            if gradient_error > self.rtol:
                broken.append(self._wrong(found, gradient_error))
        weight_error = self._weight_error(weights, self.d, scale)
        if weight_error > self.rtol and not broken:
            base_alone = self._weight_error(weights, self.plain, 1.0) <= self.rtol
            broken.append(
                _BASE_ALONE
                if base_alone and self.opt.needs_second_pass
                else f"the weights are off those of {type(self.opt.base_optimizer).__name__}'s step with d by "
                f"{weight_error:.1e}: something else steps, or changes the gradient after the second pass"
            )
        if broken:
            raise AssertionError("\n".join(["the step is not the method's:", *(f"- {line}" for line in broken)]))
        return StepReport(gradient_error, weight_error, scale)

    def _wrong(self, found: list[Tensor], error: float) -> str:
        if _compare(found, self.plain)[0] <= self.rtol:
            return _BASE_ALONE
        return (
            f"the final gradient is off the method's d by {error:.1e}: passes of another batch, a backward too many or "
            "too few, a zero_grad() between the passes, or a loss that is no mean over the rows"
        )

    def _weight_error(self, weights: list[Tensor], d: list[Tensor], scale: float) -> float:
        """Relative error of how the weights moved, beside the base optimizer's own step with scale d."""
        self.all.restore()
        before = self.all.weights()
        put(self.all.params, [(g * scale).to(p.dtype) for p, g in zip(self.all.params, d, strict=True)])
        self.opt.base_optimizer.step()
        moves = [
            [a.double() - b.double() for a, b in zip(now, before, strict=True)] for now in (weights, self.all.weights())
        ]
        return _distance(*moves)

    def _state(self, left: list[Tensor | None]) -> list[str]:
        now = self.all.now()
        is_weight = [any(slot.held is p for p in self.all.params) for slot in self.all.slots]
        rows = zip(self.all.names, now, left, is_weight, strict=True)
        moved = [name for name, a, b, weight in rows if not weight and not _are_close(a, b, self.rtol)]
        if not moved:
            return []
        what = ", ".join(dict.fromkeys(moved))
        if not modules_of(self.opt.model):
            return [f"{what}: moved in more than one forward, since the optimizer was built without model="]
        return [
            f"{what}: not as the first pass leaves it, since model= does not hold the module; pass all modules that "
            "the loss uses, or keep="
        ]

    def _random(self, draws: RandomState) -> list[str]:
        now = RandomState({p.device for p in self.all.params}, self.opt.generators)
        if not self.opt.same_rng or now.equals(draws):
            return []
        return ["random generators are not where one forward leaves them: a pass outside of the step's, or other draws"]

    def _ranks(self) -> list[str]:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return []
        total = sum(
            (checksum(p.grad) for p in self.all.params if p.grad is not None), torch.zeros((), dtype=torch.int64)
        )
        ends = torch.stack([total, -total])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] == -ends[1]:
            return []
        return [
            "final gradients differ between ranks, whose weights drift apart: nobody reduces them. Wrap the model in "
            "DistributedDataParallel, use the wrapper in the loss, and pass it as model="
        ]


_BASE_ALONE = (
    "the loop took the base optimizer's step: nothing was perturbed, or the second pass's gradient was not used. Use "
    "opt.step(losses, *batch), opt.step(closure), or opt.ascent() and opt.descent() around the passes"
)


def _compare(found: list[Tensor], d: list[Tensor]) -> tuple[float, float]:
    """Return the relative distance after the best positive factor, and that factor."""
    length = sum(float(t.double().abs().square().sum()) for t in d)
    product = sum(float((a.double() * b.double()).sum()) for a, b in zip(found, d, strict=True))
    scale = product / length if length > 0 and product > 0 else 1.0
    scale = 1.0 if abs(scale - 1) < 1e-3 else scale
    return _distance(found, [t * scale for t in d]), scale


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    length = sum(float(t.double().square().sum()) for t in expected) ** 0.5
    away = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True)) ** 0.5
    return away / length if length > 0 else (0.0 if away == 0 else float("inf"))


def _are_close(some: Tensor | None, other: Tensor | None, rtol: float) -> bool:
    if some is None or other is None:
        return some is other
    if not some.is_floating_point():
        return torch.equal(some, other)
    return some.shape == other.shape and torch.allclose(some, other, rtol=rtol, atol=rtol, equal_nan=True)


def _modules_behind(function: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Yield the modules that a function reaches: itself, its owner, its closure, arguments and globals by name."""
    if isinstance(function, nn.Module):
        yield function
        return
    if depth == 0:
        return
    if isinstance(function, functools.partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield from _modules_behind(part, depth - 1)
        return
    if inspect.ismethod(function):
        yield from _modules_behind(function.__self__, depth - 1)
        function = function.__func__
    if inspect.isfunction(function):
        seen = inspect.getclosurevars(function)
        for value in (*seen.nonlocals.values(), *seen.globals.values(), *(function.__defaults__ or ())):
            if isinstance(value, nn.Module) or inspect.isroutine(value) or isinstance(value, functools.partial):
                yield from _modules_behind(value, depth - 1)
