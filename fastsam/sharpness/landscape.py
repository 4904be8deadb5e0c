"""The loss around a minimum, on a line or a plane of random directions, and on the line from one model to another."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsam.arguments import check_integer, check_number
from fastsam.sharpness.directions import orthogonal_pair
from fastsam.sharpness.objective import How, Mode, Objective, Progress, count_batches, wide
from fastsam.two_pass.module_state import Modules, as_one


@dataclass(frozen=True)
class Landscape:
    """Losses on a grid of points.

    Attributes:
        at: coordinates along each direction, in units of the direction; shape [points], float64 on the CPU.
        losses: mean losses, float64 on the CPU, of shape [pairs, points] or [pairs, points, points]; the first
            direction's coordinate comes first. nan where the loss is not finite.
        samples: over all ranks.
        forwards: of all samples, that it took.
    """

    at: Tensor
    losses: Tensor
    samples: int
    forwards: int

    @property
    def mean(self) -> Tensor:
        """Mean over the pairs of directions, of shape [points] or [points, points]; nan where any of them is."""
        return self.losses.mean(0)

    @property
    def missing(self) -> int:
        """How many points have no finite loss."""
        return int(self.losses.isnan().sum())


def landscape(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    *,
    dimensions: int = 2,
    points: int = 11,
    extent: float = 1.0,
    pairs: int = 1,
    scale_vectors: bool = False,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> Landscape:
    """Compute the mean loss at `w + a d1 + b d2` for a and b from -extent to extent.

    d1 and d2 are random, orthogonal and filter-normalised: each filter as long as the weights' own, so that 1.0 is a
    change of every filter by its own length, whatever the model's scale. Models of one architecture measured with one
    seed are moved along the same random numbers. Each batch is read once and meets all points. The model is left as it
    was, to the last bit.

    Args:
        model: as for `sam_sharpness`; its parameters with requires_grad=True move.
        loss_fn: as for `sam_sharpness`: returns per-sample losses of shape [n].
        loader: as for `sam_sharpness`.
        dimensions: 1 for a line, 2 for a plane.
        points: along each direction, at least 2; an odd number has one at the weights themselves.
        extent: coordinate of the last point, above 0, in lengths of the filters.
        pairs: of directions, each with a landscape of its own, at least 1; `Landscape.mean` averages them.
        scale_vectors: whether biases and the weights of norms move too; else they stay.
        mode: as for `sam_sharpness`; running statistics stay what they are in "eval".
        seed: of the first pair; the next has seed + 1. Also of the random numbers in every pass over the loader.
        sharded: as for `sam_sharpness`.
        progress: called after every point of every batch with how many are done, and how many there are, or None.

    Returns:
        The losses with their coordinates.

    Raises:
        ValueError: dimensions, points, extent or pairs are out of range, or what `sam_sharpness` refuses.

    Papers: Li et al. 2018 (https://arxiv.org/abs/1712.09913); averaged over pairs as Du et al. 2021
    (https://arxiv.org/abs/2110.03141) do.
    """
    check_integer("dimensions", dimensions, 1, 2)
    check_integer("pairs", pairs, 1)
    check_number("extent", extent, lambda number: number > 0, "above 0")
    at = _coordinates(-extent, extent, points)
    objective = Objective(model, loss_fn, loader, How(mode, seed, sharded, progress))
    directions = [orthogonal_pair(objective.params, seed + i, scale_vectors)[:dimensions] for i in range(pairs)]
    grid = torch.cartesian_prod(*[at] * dimensions).reshape(-1, dimensions).tolist()
    moves = [(pair, tuple(steps)) for pair in directions for steps in grid]
    with objective.measuring():
        # the weights of every point are made anew from these, so that no rounding adds up
        start = [p.detach().to(wide(p), copy=True) for p in objective.params]

        def go(i: int) -> None:
            pair, steps = moves[i]
            weights = start
            for direction, step in zip(pair, steps, strict=True):
                weights = list(torch._foreach_add(weights, direction, alpha=step))
            _set(objective.params, weights)

        losses = _losses_at(objective, len(moves), go)
        shape = (pairs, *[points] * dimensions)
        return Landscape(at, losses.view(shape), int(objective.all_samples()), len(moves))


def line(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    *,
    points: int = 21,
    beyond: float = 0.25,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> Landscape:
    """Compute the mean loss on the line `(1 - a) start + a end` between two state dicts of a model.

    Floating-point buffers, running statistics among them, lie on the line like the weights, but stay what they are at
    the nearer end beyond both, where variances would become negative; those that count are the start's up to a = 1/2
    and then the end's. The model is left as it was, to the last bit.

    Args:
        model: as for `sam_sharpness`, of the state dicts' architecture; its own weights do not matter.
        loss_fn: as for `sam_sharpness`.
        loader: as for `sam_sharpness`.
        start: state dict at a = 0.
        end: state dict at a = 1.
        points: on the line, at least 2.
        beyond: how far the line goes on at both ends; a runs from -beyond to 1 + beyond.
        mode: as for `sam_sharpness`.
        seed: of the random numbers in every pass over the loader.
        sharded: as for `sam_sharpness`.
        progress: as for `landscape`.

    Returns:
        A landscape of one dimension, with a as its coordinates.

    Raises:
        ValueError: a state dict is that of another architecture, points or beyond are out of range, or what
            `sam_sharpness` refuses.

    Paper: Goodfellow et al. 2014 (https://arxiv.org/abs/1412.6544).
    """
    check_number("beyond", beyond, lambda number: number >= 0, ">= 0")
    at = _coordinates(-beyond, 1 + beyond, points)
    module = as_one(model)
    assert module is not None
    own: dict[str, Tensor] = module.state_dict()
    weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, state in (("start", start), ("end", end)):
        check_state(own, state, name)
    objective = Objective(model, loss_fn, loader, How(mode, seed, sharded, progress))
    with objective.measuring():

        def go(i: int) -> None:
            a = float(at[i])
            within = min(max(a, 0.0), 1.0)
            values = [
                _between(start[k].to(t.device), end[k].to(t.device), a if k in weights else within)
                for k, t in own.items()
            ]
            _set(list(own.values()), values)
            objective.keep_buffers()

        losses = _losses_at(objective, points, go)
        return Landscape(at, losses.view(1, -1), int(objective.all_samples()), points)


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError unless a state dict fits another one.

    Args:
        own: the model's.
        state: the other.
        name: of the other, for the message.
    """
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"has {key} as well" for key in state if key not in own]
    problems += [
        f"has {key} of shape {list(state[key].shape)}, not {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{name} is of another architecture than the model: it {', it '.join(problems[:4])}{more}")


def _coordinates(first: float, last: float, points: int) -> Tensor:
    check_integer("points", points, 2)
    return torch.linspace(first, last, points, dtype=torch.float64)


def _between(start: Tensor, end: Tensor, a: float) -> Tensor:
    if not start.is_floating_point():
        return start if a <= 0.5 else end
    wider = wide(start)
    return (1 - a) * start.to(wider) + a * end.to(wider)


@torch.no_grad()
def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_([t.detach() for t in tensors], [v.to(t.dtype) for v, t in zip(values, tensors, strict=True)])


def _losses_at(objective: Objective, points: int, go: Callable[[int], None]) -> Tensor:
    """Return mean losses at so many points, float64 on the CPU of shape [points], nan where they are not finite.

    Args:
        objective: within `measuring()`.
        points: how many.
        go: moves the weights to one of them.
    """
    sums = torch.zeros(points, dtype=torch.float64, device=objective.device)
    batches = count_batches(objective.loader)
    for done, batch in enumerate(objective.batches()):
        for i in range(points):
            go(i)
            sums[i] += objective.losses_alone(batch).double().sum()
            objective.report(done * points + i + 1, None if batches is None else batches * points)
    losses = (objective.total(sums) / objective.all_samples()).cpu()
    return torch.where(losses.isfinite(), losses, math.nan)
