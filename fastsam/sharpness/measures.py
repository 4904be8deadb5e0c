"""Sharpness as the papers measure it: how much the loss rises within a radius of the weights.

    sharpness = (1/N) sum over disjoint subsets S of  |S| (L_S(w + eps_S) - L_S(w))
    eps_S     = rho T^2 g / ||T g||_2,  g = grad L_S(w)          (SAM's Eq. 2; ASAM's Eq. 7 with T = |w|)

The subsets are the loader's batches, or shards of them (m-sharpness: Foret et al. 2020, section 4.1).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsam.arguments import check_integer, check_radius
from fastsam.kernels import ops
from fastsam.kernels.reference import E0
from fastsam.kernels.tensor_list import Backup
from fastsam.sharpness.objective import How, Mode, Objective, Progress, count_batches, wide
from fastsam.two_pass.ascent import Ascent
from fastsam.two_pass.batch import Batch, split_rows
from fastsam.two_pass.module_state import Modules


@dataclass(frozen=True)
class Sharpness:
    """A measured sharpness.

    Attributes:
        value: mean of L(w + eps) - L(w), in units of the loss.
        loss: mean of L(w).
        perturbed_loss: mean of L(w + eps), of the same samples.
        samples: over all ranks.
        subsets: how many perturbations were made, over all ranks.
        rho: radius of each.
        gradients: what it cost, in forwards and backwards of all samples; a forward counts a third.
    """

    value: float
    loss: float
    perturbed_loss: float
    samples: int
    subsets: int
    rho: float
    gradients: float

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class GradientCosine:
    """How far the gradient turns within the radius.

    Attributes:
        mean: of the cosines between the gradients at w and at w + eps, each batch by itself.
        batches: how many, over all ranks.
    """

    mean: float
    batches: int


def sam_sharpness(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    ascent_steps: int = 1,
    whole_loader: bool = False,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> Sharpness:
    """Measure by how much the loss rises along SAM's perturbation, averaged over the loader's batches.

    Each batch has a perturbation of its own, so that with batches of m samples this is m-sharpness: say the batch size
    with the number. The mean weighs batches by their samples. The model is left as it was, to the last bit: weights,
    buffers, gradients, modes and random number generators.

    Args:
        model: the module, or a sequence of them. Its parameters with requires_grad=True are perturbed, all of them.
        loss_fn: as `opt.step` takes it: called with a batch, returns per-sample losses of shape [n], without backward.
            Measure the clean loss: no label smoothing, no KL to a past.
        loader: batches, a tuple or list of arguments each, which can be walked repeatedly: a DataLoader, a list.
            Tensors are moved to the first parameter's device. Every pass over it begins with the same random numbers.
        rho: radius in the 2-norm over all parameters, >= 0. Default 0.05.
        adaptive: ASAM's perturbation, with T = `|w|`.
        ascent_steps: K steps of size rho, each projected back to the ball of radius rho; 1 is SAM's own.
        whole_loader: one perturbation for all batches together, along the gradient of their mean loss: what m-sharpness
            becomes when m is the number of samples.
        mode: "eval" measures with the running statistics of batch norm and without dropout, as the model is used;
            "train" with the statistics of each batch, as SAM's own step does.
        seed: of the random numbers in every pass over the loader, and of the rounding of 16-bit weights.
        sharded: whether each rank's loader holds its own part of the data, so that sums go over all ranks, all of which
            must call this. None looks for a distributed sampler in the loader; its padding counts twice, as it does in
            training. DistributedDataParallel's own communication is left out.
        progress: called with the number of batches done and that of all, or None; of passes over them with
            `whole_loader`.

    Returns:
        The sharpness, with the losses it is the difference of.

    Raises:
        ValueError: rho is negative or not finite, ascent_steps is below 1, the loader has no data, no parameter
            requires a gradient, or a parameter is a DTensor.
        TypeError: the loss function does not return n losses, or the loader is an iterator.

    Papers: Foret et al. 2020 (https://arxiv.org/abs/2010.01412), Eq. 2 and appendix C.6; Kwon et al. 2021
    (https://arxiv.org/abs/2102.11600), Eq. 7.
    """
    objective = Objective(model, loss_fn, loader, How(mode, seed, sharded, progress))
    climb = _Climb(objective, rho, adaptive, ascent_steps)
    with objective.measuring():
        return _of_whole(objective, climb) if whole_loader else _of_subsets(objective, climb, None)


def m_sharpness(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float = 0.05,
    *,
    shard_size: int,
    adaptive: bool = False,
    ascent_steps: int = 1,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> Sharpness:
    """Measure the sharpness with a perturbation for every `shard_size` samples: m-sharpness with m = shard_size.

    Each batch is cut into shards of so many rows; the last of a batch has what is left, and weighs as much. The other
    arguments, the result and what is raised are those of `sam_sharpness`.

    Args:
        model: as there.
        loss_fn: as there.
        loader: as there; the batches should hold a multiple of `shard_size` samples.
        rho: as there.
        shard_size: m, the samples that share a perturbation, >= 1.
        adaptive: as there.
        ascent_steps: as there.
        mode: as there.
        seed: as there.
        sharded: as there.
        progress: as there.

    Raises:
        ValueError: shard_size is below 1, or what `sam_sharpness` refuses.

    Paper: Foret et al. 2020 (https://arxiv.org/abs/2010.01412), section 4.1.
    """
    check_integer("shard_size", shard_size, 1)
    objective = Objective(model, loss_fn, loader, How(mode, seed, sharded, progress))
    climb = _Climb(objective, rho, adaptive, ascent_steps)
    with objective.measuring():
        return _of_subsets(objective, climb, shard_size)


def gradient_cosine(
    model: Modules,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    mode: Mode = "eval",
    seed: int = 0,
    sharded: bool | None = None,
    progress: Progress | None = None,
) -> GradientCosine:
    """Measure the cosine between the gradients of SAM's first and second pass, averaged over the loader's batches.

    Near 1 the second pass has nothing new to say; the smaller it is the more the surface bends within the radius. The
    arguments and what is raised are those of `sam_sharpness`; batches count equally, whatever their sizes are.

    Args:
        model: as there.
        loss_fn: as there.
        loader: as there.
        rho: as there.
        adaptive: as there.
        mode: as there.
        seed: as there.
        sharded: as there.
        progress: as there.

    Returns:
        The mean of the cosines; nan where a gradient is zero.
    """
    objective = Objective(model, loss_fn, loader, How(mode, seed, sharded, progress))
    climb = _Climb(objective, rho, adaptive, 1)
    cosines: list[Tensor] = []
    with objective.measuring():
        total = count_batches(loader)
        for batch in objective.batches():
            first = climb.gradient(batch)
            climb.up(batch, first)
            second = climb.gradient(batch)
            climb.down()
            ascent = climb.ascent(first)
            cosines.append(ascent.dot(first, second) / (ascent.norm() * climb.ascent(second).norm()))
            objective.report(len(cosines), total)
        sums = torch.stack([torch.stack(cosines).sum(), torch.tensor(float(len(cosines))).to(cosines[0])])
        value, subsets = objective.total(sums).tolist()
        return GradientCosine(value / subsets, int(subsets))


class _Climb:
    """Moves the weights up along a gradient, and back."""

    def __init__(self, objective: Objective, rho: float, adaptive: bool, steps: int) -> None:
        check_radius("rho", rho)
        check_integer("ascent_steps", steps, 1)
        self.objective, self.rho, self.steps = objective, rho, steps
        self._groups = [{"rho": rho}] * len(objective.params)
        self._etas: list[float | None] | None = [0.0] * len(objective.params) if adaptive else None
        self._backup: Backup | None = None
        self._made = 0

    def gradient(self, batch: Batch) -> list[Tensor]:
        """Return the gradient of a batch's mean loss at the weights as they are."""
        return self.objective.gradient_of(self.objective.losses(batch) / batch.n)

    def ascent(self, grads: list[Tensor]) -> Ascent:
        """Return the ascent along these gradients."""
        params = self.objective.params
        found: dict[int, tuple[Tensor, Any, dict[str, Any]]] = {
            i: (p, g, group) for i, (p, g, group) in enumerate(zip(params, grads, self._groups, strict=True))
        }
        return Ascent.of(
            found,
            step=self._made,
            seed=self.objective.how.seed,
            n_params=len(params),
            backup_of=self._backup_of,
            rounds=True,
        )

    def _backup_of(self, weights: list[Tensor]) -> Backup:
        if self._backup is None or not self._backup.fits(weights):
            self._backup = Backup(weights)
        return self._backup

    @torch.no_grad()
    def up(self, batch: Batch | None, grads: list[Tensor]) -> None:
        """Perturb the weights: by one step along `grads`, or by K of which the others take gradients of their own.

        Args:
            batch: whose gradient the later steps take; None for the whole loader's.
            grads: at the weights as they are.
        """
        self._made += 1
        ascent = self.ascent(grads)
        if self.steps == 1:
            ascent.move(ascent.norm(self._etas), lambda group: group["rho"], self._etas)
            return
        scales = [None if self._etas is None else w.abs().to(wide(w)) for w in ascent.weights]
        eps: list[Tensor] = [torch.zeros_like(w, dtype=wide(w)) for w in ascent.weights]
        for k in range(self.steps):
            if k > 0:
                with torch.enable_grad():
                    ascent = self.ascent(self.objective.gradient() if batch is None else self.gradient(batch))
                self.down()
            # once more at w, where T is |w|
            eps = _projected(_added(eps, ascent, ascent.norm(self._etas), scales, self.rho), ascent, scales, self.rho)
            ascent.add(eps)

    def down(self) -> None:
        """Put the weights back to the last bit."""
        assert self._backup is not None
        ops.restore_(self._backup)


def _added(eps: list[Tensor], ascent: Ascent, norm: Tensor, scales: list[Any], rho: float) -> list[Tensor]:
    """Return eps + rho T^2 g / (||T g|| + e0), and eps where the norm is zero or not finite."""
    factor = torch.where(torch.isfinite(norm) & (norm > 0), rho / (norm + E0), 0.0)
    steps = [g if scale is None else g * scale.square() for g, scale in zip(ascent.grads, scales, strict=True)]
    return [e + torch.nan_to_num(step) * factor.to(step.device, step.dtype) for e, step in zip(eps, steps, strict=True)]


def _projected(eps: list[Tensor], ascent: Ascent, scales: list[Any], rho: float) -> list[Tensor]:
    """Return eps scaled down to ||T^-1 eps|| <= rho."""
    in_ball = [e if s is None else torch.where(s > 0, e / s, 0.0) for e, s in zip(eps, scales, strict=True)]
    length = replace(ascent, grads=in_ball).norm()
    factor = torch.clamp(rho / length, max=1.0)
    return [e * factor.to(e.device, e.dtype) for e in eps]


def _of_subsets(objective: Objective, climb: _Climb, shard_size: int | None) -> Sharpness:
    before, after, subsets = (torch.zeros((), dtype=torch.float64, device=objective.device) for _ in range(3))
    batches = count_batches(objective.loader)
    for done, batch in enumerate(objective.batches(), start=1):
        for shard in _shards(batch, shard_size):
            losses = objective.losses(shard)
            climb.up(shard, objective.gradient_of(losses / shard.n))
            after += objective.losses_alone(shard).double().sum()
            climb.down()
            before += losses.detach().double().sum()
            subsets += 1
        objective.report(done, batches)
    totals = objective.total(torch.stack([before, after, subsets])).tolist()
    loss, perturbed_loss = (total / objective.all_samples() for total in totals[:2])
    return _result(objective, climb, loss, perturbed_loss, int(totals[2]), climb.steps + 1 / 3)


def _of_whole(objective: Objective, climb: _Climb) -> Sharpness:
    passes = climb.steps + 2
    before = float(objective.loss())
    objective.report(1, passes)
    grads = objective.gradient()
    objective.report(2, passes)
    climb.up(None, grads)
    after = float(objective.loss())
    climb.down()
    objective.report(passes, passes)
    return _result(objective, climb, before, after, 1, climb.steps + 2 / 3)


def _result(
    objective: Objective, climb: _Climb, loss: float, perturbed_loss: float, subsets: int, gradients: float
) -> Sharpness:
    samples = int(objective.all_samples())
    return Sharpness(perturbed_loss - loss, loss, perturbed_loss, samples, subsets, climb.rho, gradients)


def _shards(batch: Batch, size: int | None) -> Iterator[Batch]:
    if size is None or size >= batch.n:
        yield batch
        return
    rest = batch.n % size
    sizes = [size] * (batch.n // size) + ([rest] if rest else [])
    for shard in split_rows(batch, sizes):
        assert isinstance(shard, Batch)
        yield shard
