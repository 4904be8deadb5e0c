"""ESAM: Efficient Sharpness-aware Minimization (Du et al. 2021, https://arxiv.org/abs/2110.03141).

    m        ~ Bernoulli(beta) for every tensor, or element              (stochastic weight perturbation)
    g        = grad L_B(w), of the tensors with m = 1 alone
    eps      = rho m g / (beta ||m g||_2)                                (Eq. 4-5)
    delta_i  = l_i(w + eps) - l_i(w)                                     (sharpness-sensitive data selection, Eq. 6)
    B+       = the gamma |B| rows with the largest delta_i
    d        = grad L_B+(w + eps)
    w       <- base step from w with d                                   (Alg. 1)

beta is the probability of being kept. Where the paper and its code disagree we follow the code's numbers, but draw the
mask at the start of every step and keep exactly floor(gamma |B|) rows.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.distributed.dtensor import first_element
from fastsam.kernels import ops, philox
from fastsam.kernels.philox import Draw
from fastsam.sam import SAM, check_choice
from fastsam.two_pass import capture
from fastsam.two_pass.batch import check_losses, take_rows
from fastsam.two_pass.optimizer import Ascended
from fastsam.two_pass.wrapper import SEED, STEP


class ESAM(SAM):
    """SAM at a lower price: part of the tensors are perturbed, and part of the rows are used in the second pass.

    With DistributedDataParallel all ranks draw the same masks, and each chooses among its own rows. Takes the arguments
    of `SAM`, and:

    Args:
        beta: probability that a tensor (or element) is perturbed, in (0, 1]; a knob of each group. 1 perturbs all.
        gamma: share of the rows that the second pass uses, in (0, 1]: max(1, floor(gamma n + 1e-6)) of n, two at
            least where `model` has batch norm in training mode. 1 uses all and skips the selection forward. With less
            than 1 only `step(loss_fn, *batch)` works; the first group's value counts.
        mask: "tensor" draws for whole tensors and does not compute the ascent gradients of the others, which a
            compiled model answers by recompiling, and for which graph_step computes all and draws on the device;
            "element" draws for every element, saves nothing, and of sharded weights takes those whose shards are whole
            rows, as fully_shard's are.
        norm: of the gradient in eps. "masked": of the perturbed part, as the authors' code; then ||eps|| = rho / beta.
            "full": of the whole gradient, which has to be computed; then the mean of eps over masks is SAM's.
            "estimated": of the perturbed part, over sqrt(beta).
        selection: "reforward" runs a new forward on the chosen rows; "reuse" runs backward through the forward that
            chose them, on all rows, which costs more and is there for comparison.
        strict: choose the rows strictly above the smallest of the largest deltas, as the authors' code does (63 of
            128 at gamma = 0.5; none at all where all are equal). Waits for the device.

    Raises:
        ValueError: beta or gamma outside (0, 1], or an unknown mask, norm or selection; and what `SAM` raises.
    """

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        rho: float = 0.05,
        adaptive: Any = False,
        *,
        beta: float = 0.6,
        gamma: float = 0.5,
        mask: Literal["tensor", "element"] = "tensor",
        norm: Literal["masked", "full", "estimated"] = "masked",
        selection: Literal["reforward", "reuse"] = "reforward",
        strict: bool = False,
        **keywords: Any,
    ) -> None:
        check_choice("mask", mask, ("tensor", "element"))
        check_choice("norm", norm, ("masked", "full", "estimated"))
        check_choice("selection", selection, ("reforward", "reuse"))
        self.mask, self.norm, self.selection, self.strict = mask, norm, selection, strict
        self.last_selected_fraction = 1.0
        self._own_knobs = {"beta": beta, "gamma": gamma}
        super().__init__(params, base_optimizer, rho, adaptive, **keywords)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for p in group["params"]:
            if self.mask == "element" and first_element(p) is None:
                raise ValueError(
                    f"mask='element' needs shards that are whole rows of their weight, but one of shape "
                    f"{tuple(p.shape)} lies on the ranks as {p.placements}; use mask='tensor'"
                )

    def _check_knobs(self, knobs: dict[str, Any]) -> None:
        super()._check_knobs(knobs)
        for name in ("beta", "gamma"):
            value = knobs.get(name, 1.0)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")

    @property
    def _gamma(self) -> float:
        return self.knob(self.param_groups[0], "gamma")

    def _check_form(self, call: str) -> None:
        if self._gamma < 1:
            raise RuntimeError(
                f"{call} cannot select rows (gamma={self._gamma}); use opt.step(loss_fn, *batch), or pass gamma=1 to "
                "keep the stochastic perturbation alone"
            )

    # stochastic weight perturbation

    def _kept(self) -> list[bool]:
        """The tensor mask of this step, in group order: the same on every rank, backend and device."""
        if self.mask == "element" or capture.recorder() is not None:  # whose kernels draw the mask
            return [True] * len(self._params())
        group = self.param_groups[0]
        betas = tuple(self.knob(group, "beta") for group in self.param_groups for _ in group["params"])
        words = philox.first_words(len(betas), group[STEP], group[SEED])
        return [word < philox.threshold(beta) for word, beta in zip(words, betas, strict=True)]

    def _perturbs_nothing(self) -> bool:
        wanted = zip(self._kept(), super()._chosen(), self._params(), strict=True)
        return not any(kept and chosen and p.requires_grad for kept, chosen, p in wanted)

    def _chosen(self) -> list[bool]:
        chosen = super()._chosen()
        if self.norm == "full":  # what is masked still counts in the norm
            return chosen
        return [kept and wanted for kept, wanted in zip(self._kept(), chosen, strict=True)]

    def _enter_ascent(self) -> None:
        super()._enter_ascent()
        self._run.freeze(self._left_out())

    def _ascends_locally(self) -> bool:
        leaves_gaps = self._run.replicas.reduce_in_backward and bool(self._left_out())
        return not self._perturbs_nothing() and (super()._ascends_locally() or leaves_gaps)

    def _left_out(self) -> list[Tensor]:
        """Parameters whose ascent gradient nobody needs."""
        if self.norm == "full" or self._perturbs_nothing() or not self._run.replicas.may_skip_gradients:
            return []
        return [p for p, wanted in zip(self._params(), self._chosen(), strict=True) if not wanted and p.requires_grad]

    def _perturb(self, ascended: Ascended) -> Tensor:
        norm = self._norm(ascended)
        kept = self._kept()
        self._move(ascended.take([row for row, i in enumerate(ascended.indices) if kept[i]]), norm)
        return norm

    def _norm(self, ascended: Ascended) -> Tensor:
        draw = self._draw(ascended)
        if self.norm == "full" or draw is None or draw.keep is None:
            norm = super()._norm(ascended)
        else:
            norm = self._norm_over_ranks(ascended, draw)
        return norm / math.sqrt(self.knob(self.param_groups[0], "beta")) if self.norm == "estimated" else norm

    def _radii(self, ascended: Ascended) -> list[float]:
        betas = [self.knob(group, "beta") for group in ascended.groups]
        return [rho / beta for rho, beta in zip(super()._radii(ascended), betas, strict=True)]

    def _draw(self, ascended: Ascended) -> Draw | None:
        betas = tuple(self.knob(group, "beta") for group in ascended.groups)
        is_whole = self.mask == "tensor"
        if all(beta == 1 for beta in betas) or (is_whole and capture.recorder() is None):
            return super()._draw(ascended)
        return self._draw_with(ascended, rounding=bool(self.stochastic_rounding), keep=betas, whole=is_whole)

    def _obstacle(self, scaler: Any) -> str | None:
        return "strict=True reads the device" if self.strict else super()._obstacle(scaler)

    def _is_typical(self) -> bool:
        # a step that perturbs nothing has one pass; of many tensors that never happens, and to look takes a while
        groups = [group for group in self.param_groups if self.knob(group, "perturb")]
        chance = math.prod((1 - self.knob(g, "beta")) ** sum(p.requires_grad for p in g["params"]) for g in groups)
        return self.mask == "element" or chance < 2**-60 or not self._perturbs_nothing()

    def _outcomes(self) -> list[tuple[Any, str]]:
        return [*super()._outcomes(), (self, "last_selected_fraction")]

    def _skip_for(self) -> Tensor | None:
        # without a direction there are no sharpness-sensitive rows either
        norm = self.last_grad_norm
        return self._run.replicas.any(None if norm is None else ~torch.isfinite(norm))

    # sharpness-sensitive data selection

    def _second_pass(self, loss_fn: Callable, batch: tuple, first: Tensor, backward: Callable[[Tensor], None]) -> None:
        n = len(first)
        k = self._number_of_rows(n)
        self.last_selected_fraction = k / n
        if k == n and not self.strict:
            super()._second_pass(loss_fn, batch, first, backward)
        elif self.selection == "reuse":
            losses = check_losses(loss_fn(*batch), n)
            backward(losses.index_select(0, self._rows(losses.detach(), first, k)))
        else:
            with torch.no_grad():
                after = check_losses(loss_fn(*batch), n, needs_grad=False)
            rows = self._rows(after, first, k)
            self._run.replay_draws()
            backward(check_losses(loss_fn(*take_rows(batch, rows)), len(rows)))

    def _number_of_rows(self, n: int) -> int:
        smallest = 2 if self._run.statistics.any_training() else 1
        return min(n, max(smallest, math.floor(self._gamma * n + 1e-6)))

    def _rows(self, after: Tensor, before: Tensor, k: int) -> Tensor:
        kernels = ops.pick([after])
        rows = kernels.select_largest_increase(after, before, k)
        if not self.strict:
            return rows
        delta = (after - before)[rows]
        above = rows[delta > delta.min()]
        if not len(above):
            raise RuntimeError(
                f"strict=True found no row above the {k} largest deltas, which are all equal; use strict=False, or a "
                "larger gamma or batch"
            )
        self.last_selected_fraction = len(above) / len(before)
        return above
