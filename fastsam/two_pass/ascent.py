"""An ascent: the tensors to perturb, their gradients, the norm over ranks, and the move of the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed.dtensor import (
    Placement,
    are_plain,
    first_element,
    laid_out_as,
    local,
    placement,
    shard_number,
    sum_over_ranks,
)
from fastsam.kernels import ops
from fastsam.kernels.philox import Draw
from fastsam.kernels.reference import E0
from fastsam.kernels.replay_tables import Refreshable
from fastsam.kernels.tensor_list import Backup
from fastsam.two_pass import capture
from fastsam.two_pass.gradients import are_odd


@dataclass
class Ascent:
    """The tensors that a method perturbs, those of groups with perturb=True, in parallel lists.

    Attributes:
        weights: this rank's entries of each weight, real: a complex number counts as two.
        grads: the ascent gradient of each, dense, of the weight's shape and of any floating-point dtype; None in a step
            without a first pass.
        groups: the parameter group of each.
        params: the parameter of each, whole: a DTensor where the weight is a shard.
        indices: the position of each among all parameters in group order.
        placements: how each lies on the ranks; None for a tensor that is whole here.
        step: addresses random numbers, with `seed`; another for every perturbation.
        seed: of the optimizer.
        n_params: how many parameters the optimizer has.
        backup_of: returns the memory that keeps the weights' values while they are perturbed.
        rounds: whether 16-bit weights round stochastically.
    """

    weights: list[Tensor]
    grads: list[Any]
    groups: list[dict[str, Any]]
    params: list[Tensor]
    indices: tuple[int, ...]
    placements: list[Placement | None]
    step: int
    seed: int
    n_params: int
    backup_of: Callable[[list[Tensor]], Backup]
    rounds: bool

    @classmethod
    def of(cls, found: dict[int, tuple[Tensor, Any, dict[str, Any]]], **about: Any) -> "Ascent":
        """Return the ascent along these gradients.

        Args:
            found: parameter, gradient (None without a first pass) and group, by position in group order.
            about: the other attributes.
        """
        params, grads = [p for p, _, _ in found.values()], [g for _, g, _ in found.values()]
        weights = list(params)
        # Most lists are of plain tensors, of which each need not be asked what it is.
        if not (are_plain(params) and are_plain(grads)) or are_odd(params, grads):
            weights = [as_real(local(p)) for p in params]
            pairs = zip(params, grads, strict=True)
            grads = [None if g is None else as_real(local(laid_out_as(p, as_dense(g)))) for p, g in pairs]
        return cls(
            weights=weights,
            grads=grads,
            groups=[group for _, _, group in found.values()],
            params=params,
            indices=tuple(found),
            placements=[None] * len(params) if are_plain(params) else list(map(placement, params)),
            **about,
        )

    def take(self, rows: Sequence[int]) -> "Ascent":
        """Return the ascent of the tensors at these positions of the lists alone."""
        return replace(
            self,
            weights=[self.weights[i] for i in rows],
            grads=[self.grads[i] for i in rows],
            groups=[self.groups[i] for i in rows],
            params=[self.params[i] for i in rows],
            indices=tuple(self.indices[i] for i in rows),
            placements=[self.placements[i] for i in rows],
        )

    def values(self, read: Callable[[dict[str, Any]], Any]) -> list[Any]:
        """Return `read(group)` for each tensor, as a list that a captured step reads anew before each replay."""
        # The groups alone: gradients must not be kept, since others may use their memory by then.
        groups = self.groups

        def again() -> list[Any]:
            of_group = {id(group): group for group in groups}
            found = {key: read(group) for key, group in of_group.items()}
            return [found[id(group)] for group in groups]

        return Refreshable(again(), again)

    @torch.no_grad()
    def norm(self, etas: Sequence[float | None] | None = None, draw: Draw | None = None) -> Tensor:
        """Return `||m T g||_2` over all tensors and ranks, each entry counted once however many ranks hold it.

        Args:
            etas: for each tensor eta of ASAM's `T = |w| + eta`, or None for T = 1; None altogether means T = 1.
            draw: random numbers of ESAM's mask m, if it has `keep_probability`; None means m = 1.

        Returns:
            0-dim float64 tensor on the first tensor's device.
        """

        if not any(self.placements):
            return ops.norm(self.grads, self.weights, etas, draw)

        def norm_of(rows: list[int]) -> Tensor:
            part = self.take(rows)
            some = None if etas is None else [etas[i] for i in rows]
            return ops.norm(part.grads, part.weights, some, draw and draw.take(rows))

        return sum_over_ranks(lambda rows: norm_of(rows).square(), self.placements).sqrt()

    @torch.no_grad()
    def dot(self, some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        """Return the sum of the products of two lists' entries over all tensors and ranks.

        Args:
            some: one tensor for each weight, of its shape.
            others: likewise.

        Returns:
            0-dim float64 tensor on the first tensor's device.
        """
        device = some[0].device

        def dot_of(rows: list[int]) -> Tensor:
            return torch.stack([(some[i].double() * others[i]).sum().to(device) for i in rows]).sum()

        if not any(self.placements):
            return dot_of(list(range(len(self.weights))))
        return sum_over_ranks(dot_of, self.placements)

    @torch.no_grad()
    def blend(self, d: Sequence[Tensor], b: Sequence[Tensor], g: Sequence[Tensor], a: Sequence[Tensor]) -> None:
        """Set each tensor of d to b d + a g, in float64 for float64 and else in float32; nothing is read on the host.

        Args:
            d: one tensor for each weight, of its shape, changed in place.
            b: a 0-dim tensor for each; where it is 0, d counts as zeros whatever it holds.
            g: like d.
            a: like b.
        """
        for d_n, b_n, g_n, a_n in zip(d, b, g, a, strict=True):
            wide = torch.promote_types(d_n.dtype, torch.float32)
            d_term, g_term = (
                torch.where(factor == 0, 0.0, tensor.to(wide) * factor.to(tensor.device, wide))
                for tensor, factor in ((d_n, b_n.to(d_n.device)), (g_n, a_n.to(d_n.device)))
            )
            d_n.copy_(d_term + g_term)

    def move(
        self,
        norm: Tensor,
        radius: Callable[[dict[str, Any]], float],
        etas: Sequence[float | None] | None = None,
        draw: Draw | None = None,
        e0: float = E0,
    ) -> None:
        """Save the weights and add eps = rho m T^2 g / (norm + e0) to them; downhill where a group maximizes.

        A norm that is zero, inf or NaN gives eps = 0. A perturbation is made by one call of `move` or `add`.

        Args:
            norm: 0-dim tensor, as `norm` returns it.
            radius: returns rho of a group.
            etas: as in `norm`.
            draw: random numbers of the mask and of stochastic rounding; by default those of rounding alone.
            e0: added to the norm.
        """
        radii = self.values(lambda group: -radius(group) if group.get("maximize") else radius(group))
        draw = self.rounding() if draw is None else draw
        backup = self.backup_of(self.weights)
        ops.perturb_(self.weights, self.grads, backup, norm, radii, etas, draw, e0)

    @torch.no_grad()
    def add(self, eps: Sequence[Tensor]) -> Tensor:
        """Save the weights and add a perturbation of the method's own making to them, nothing where it is not finite.

        Args:
            eps: this rank's entries for each weight, of its shape.

        Returns:
            ||eps||_2 over all tensors and ranks, 0-dim float64.
        """
        length = replace(self, grads=list(eps)).norm()
        # A norm of NaN perturbs nothing.
        one = torch.where(torch.isfinite(length), 1.0, torch.nan)
        backup = self.backup_of(self.weights)
        radii = [1.0] * len(self.weights)
        ops.perturb_(self.weights, list(eps), backup, one, radii, None, self.rounding(), 0.0)
        return length

    def rounding(self) -> Draw | None:
        """Return the random numbers that 16-bit weights round with; None where nothing is rounded stochastically."""
        rounds = self.rounds and any(w.dtype.itemsize == 2 for w in self.weights)
        return self.draw() if rounds else None

    def draw(self, **options: Any) -> Draw:
        """Return random numbers addressed by each element's place in its whole tensor.

        A shard that is no single stretch of its tensor has numbers of its own.

        Args:
            options: of `Draw`: `keep_probability` and `whole` for a mask, `rounding`.
        """
        starts = [first_element(p) for p in self.params]
        indices = [
            i if start is not None else i + self.n_params * shard_number(where)
            for i, start, where in zip(self.indices, starts, self.placements, strict=True)
        ]
        firsts = tuple(start or 0 for start in starts)
        return Draw(self.seed, self.step, tuple(indices), starts=firsts, advance=capture.advance(), **options)


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers in the same memory; any other tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_dense(tensor: Tensor) -> Tensor:
    """Return a sparse tensor as a dense one, the entries of an uncoalesced one summed; any other tensor as it is."""
    return tensor.to_dense() if tensor.is_sparse else tensor
