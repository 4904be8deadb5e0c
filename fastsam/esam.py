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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.arguments import check_choice, check_flag, check_number, shown
from fastsam.distributed.ddp import PerturbSync
from fastsam.distributed.dtensor import first_element, is_dtensor, local
from fastsam.kernels import ops, philox
from fastsam.kernels.philox import Draw
from fastsam.sam import SAM
from fastsam.schedule import Schedule
from fastsam.two_pass import capture
from fastsam.two_pass.ascent import Ascent
from fastsam.two_pass.batch import take_rows
from fastsam.two_pass.loss_function import check_losses
from fastsam.two_pass.losses import Losses
from fastsam.two_pass.module_state import Modules
from fastsam.two_pass.optimizer import OnBaseStep, TwoPassOptimizer
from fastsam.two_pass.wrapper import SEED, STEP

_DRAWS_ITS_MASKS = "given_mask is set, but a captured step draws its masks"


class Selection(NamedTuple):
    """What one step of `ESAM` has masked and selected."""

    mask: list[bool] | list[Tensor]
    """For each parameter in group order whether its tensor was kept; with mask="element" bool tensors, of sharded
    weights for this rank's entries."""
    rows: Tensor
    """The rows of B+, ascending: int64, shape [k]."""
    before: Tensor
    """The losses of all rows at w, shape [n]; with `fastsam.Weighted` the weighted sums of each row."""
    after: Tensor
    """The losses of all rows at w + eps, shape [n]."""

    @property
    def deltas(self) -> Tensor:
        """How much the perturbation raises each row's loss, shape [n] (Eq. 6)."""
        return self.after - self.before

    @property
    def plus(self) -> tuple[Tensor, Tensor]:
        """Mean losses of B+, the selected rows, at w and at w + eps, as in the paper's Fig. 5 and 6."""
        return self.before[self.rows].mean(), self.after[self.rows].mean()

    @property
    def minus(self) -> tuple[Tensor, Tensor]:
        """Mean losses of B-, the rows that were not selected, at w and at w + eps; NaN where there are none."""
        left = torch.ones(len(self.before), dtype=torch.bool, device=self.before.device)
        left[self.rows] = False
        return self.before[left].mean(), self.after[left].mean()


class _Mask(NamedTuple):
    """What a step's mask depends on, of which it is computed when somebody asks."""

    given: list[bool | Tensor] | None
    limits: list[int]
    """For each parameter in group order, below which a word keeps the tensor, or an element."""
    step: int
    seed: int

    def of_tensors(self) -> list[bool]:
        if self.given is not None:
            return [m if isinstance(m, bool) else True for m in self.given]
        words = philox.first_words(len(self.limits), self.step, self.seed)
        return [word < limit for word, limit in zip(words, self.limits, strict=True)]

    def of_elements(self, params: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for i, (p, limit) in enumerate(zip(params, self.limits, strict=False)):
            own = local(p)
            if self.given is not None:
                found.append(torch.ones_like(own, dtype=torch.bool) & torch.as_tensor(self.given[i], device=own.device))
                continue
            words = philox.words(own.numel(), i, self.step, self.seed, start=first_element(p) or 0, device=own.device)
            found.append((words < limit).view(own.shape))
        return found


class ESAM(SAM):
    """SAM at a lower price: part of the tensors are perturbed, and part of the rows are used in the second pass.

    With DistributedDataParallel all ranks draw the same masks, and each chooses among its own rows. A step in which no
    tensor that the mask keeps has a gradient is the base optimizer's. A step that fails has used up its mask: the next
    one draws another, by a counter in the parameter groups, so that a run that goes on from a checkpoint draws what the
    run that wrote it does. Takes the arguments of `SAM`, and:

    Args:
        beta: probability that a tensor (or element) is perturbed, in (0, 1]; set for each group. 1 perturbs all.
        gamma: share of the rows that the second pass uses, in (0, 1]: max(1, floor(gamma n + 1e-6)) of n, two at
            least where `model` has batch norm in training mode. 1 uses all and skips the selection forward. With less
            than 1 only `step(loss_fn, *batch)` works; the first group's value counts.
        mask: "tensor" draws for whole tensors, and `step(loss_fn, *batch)` does not compute the ascent gradients of
            the others; a tensor's hooks then run in the first pass only where a gradient that is needed goes through
            it. All are computed in the other ways, by graph_step, with sharded weights, with DDP's static_graph, where
            processes run but `model` is not the DDP module, and where the loss's graph holds an `autograd.Function`,
            as those of reentrant checkpoints and compiled models do, unless its forward sets
            `ctx.runs_no_backward = True`: its backward then runs no other backward, in which gradients of parameters
            that are not its inputs would come about. "element" draws for every element, saves nothing, and of sharded
            weights takes those whose shards are whole rows, as fully_shard's are.
        norm: of the gradient in eps. "masked": of the perturbed part, as the authors' code; then ||eps|| = rho / beta.
            "full": of the whole gradient, which has to be computed; then the mean of eps over masks is SAM's.
            "estimated": of the perturbed part, over sqrt(beta).
        selection: "reforward" runs a new forward on the chosen rows; "reuse" runs backward through the forward that
            chose them, on all rows, which costs more and is there for comparison. The forward that chooses runs under
            `torch.no_grad()`, but for losses that differentiate inside: where torch says that something does not
            require a gradient it is run once more, with gradients, as all later ones are.
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
        model: Modules = None,
        perturb_sync: PerturbSync | None = None,
        same_rng: bool = True,
        generators: Sequence[Any] = (),
        stochastic_rounding: bool | Literal["auto"] = "auto",
        check_finite: bool = True,
        when: Schedule | None = None,
        on_base_step: OnBaseStep = "raise",
        keep: Sequence[Any] = (),
        seed: int = 0,
        **base_kwargs: Any,
    ) -> None:
        check_choice("mask", mask, ("tensor", "element"))
        check_choice("norm", norm, ("masked", "full", "estimated"))
        check_choice("selection", selection, ("reforward", "reuse"))
        check_flag("strict", strict)
        self.mask, self.norm, self.selection, self.strict = mask, norm, selection, strict
        self.last_selected_fraction = 1.0
        self._given_mask: list[bool | Tensor] | None = None
        self.has_given_mask = False
        self._last_mask = _Mask([], [], 0, 0)
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive, "beta": beta, "gamma": gamma},
            model=model,
            perturb_sync=perturb_sync,
            same_rng=same_rng,
            generators=generators,
            stochastic_rounding=stochastic_rounding,
            check_finite=check_finite,
            when=when,
            on_base_step=on_base_step,
            keep=keep,
            seed=seed,
            **base_kwargs,
        )

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for a bad hyperparameter."""
        super().check_options(options)
        for name in ("beta", "gamma"):
            check_number(name, options.get(name, 1.0), lambda value: 0 < value <= 1, "in (0, 1]")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for p in group["params"]:
            if self.mask == "element" and first_element(p) is None:
                raise ValueError(
                    f"mask='element' needs shards that are whole rows of their weight, but one of shape "
                    f"{tuple(p.shape)} lies on the ranks as {p.placements}; use mask='tensor'"
                )

    def check(self, call: str, rows: int | None = None) -> None:
        """Raise RuntimeError where no rows can be selected, ValueError where a given mask fits no longer."""
        super().check(call, rows)
        if call != "the constructor" and self._given_mask is not None:
            self._checked_mask(self._given_mask)
        if call not in ("the constructor", "step(loss_fn, *batch)", "step()") and self._gamma < 1:
            raise RuntimeError(
                f"{call} cannot select rows (gamma={self._gamma}); use opt.step(loss_fn, *batch), or pass gamma=1 to "
                "keep the stochastic perturbation alone"
            )

    @property
    def _gamma(self) -> float:
        return self.option(self.param_groups[0], "gamma")

    # stochastic weight perturbation

    def has_draws(self) -> bool:
        """Whether the perturbation depends on random numbers."""
        return super().has_draws() or any(self.option(group, "beta") < 1 for group in self.param_groups)

    def needs_gradient(self) -> list[bool]:
        """Return which tensors the mask keeps; all that may be perturbed where the norm is of the whole gradient."""
        if self.norm == "full":
            return self.perturbed()
        return [kept and wanted for kept, wanted in zip(self._kept(), self.perturbed(), strict=True)]

    def needs_rows(self) -> bool:
        """Whether rows are selected."""
        return self._gamma < 1

    def has_second_pass(self) -> bool:
        """Whether the mask keeps any tensor; if not, the step is the base optimizer's."""
        masks = zip(self._kept(), self.perturbed(), self._params(), strict=True)
        return any(kept and wanted and p.requires_grad for kept, wanted, p in masks)

    def perturb(self, ascent: Ascent, k: int) -> Tensor:
        """Compute ||m g||_2, and move the weights that the mask m keeps by rho m g / (beta ||m g||_2) (Eq. 4-5)."""
        self._last_mask = self._next_mask(self.param_groups[0][STEP])
        if self.has_given_mask and capture.recorder() is not None:
            raise RuntimeError(f"the step cannot be captured: {_DRAWS_ITS_MASKS}; set it to None")
        masked, kept = self._masked_as_given(ascent), self._kept()
        norm = self._masked_norm(ascent if self.norm == "full" else masked)
        masked = masked.take([row for row, i in enumerate(masked.indices) if kept[i]])
        masked.move(norm, self.radius, self.etas(masked), self._draw(masked), self.e0)
        return norm

    def radius(self, group: dict[str, Any]) -> float:
        """Return rho / beta of a group."""
        return super().radius(group) / self.option(group, "beta")

    def skip(self) -> Tensor | None:
        """Skip a step without a direction, in which no rows are sharpness-sensitive either."""
        norm = self.last_grad_norm
        return self.any_rank(None if norm is None else ~torch.isfinite(norm))

    def _kept(self) -> list[bool]:
        """The tensor mask of this step, in group order: the same on every rank, backend and device."""
        # There the kernels draw the mask.
        if self._given_mask is None and (self.mask == "element" or capture.recorder() is not None):
            return [True] * len(self._params())
        return self._next_mask(self.param_groups[0][STEP]).of_tensors()

    def _next_mask(self, step: int) -> "_Mask":
        limits = [philox.threshold(self.option(g, "beta")) for g in self.param_groups for _ in g["params"]]
        return _Mask(self._given_mask, limits, step, self.param_groups[0][SEED])

    def _masked_as_given(self, ascent: Ascent) -> Ascent:
        """Return the ascent with its gradients times the elements of a given mask."""
        masks = [None if self._given_mask is None else self._given_mask[i] for i in ascent.indices]
        if not any(isinstance(m, Tensor) for m in masks):
            return ascent
        rows = zip(masks, ascent.grads, strict=True)
        return replace(
            ascent,
            grads=[
                g * m.view(m.shape + (1,) * (g.dim() - m.dim())).to(g.device) if isinstance(m, Tensor) else g
                for m, g in rows
            ],
        )

    def _masked_norm(self, ascent: Ascent) -> Tensor:
        draw, etas = self._draw(ascent), self.etas(ascent)
        masks = self.norm != "full" and draw is not None and draw.keep_probability is not None
        betas = [self.option(group, "beta") for group in ascent.groups]
        if self.norm != "estimated":
            return ascent.norm(etas, draw if masks else None)
        # each beta's part of ||m g||^2 is that beta times its part of ||g||^2 in the mean
        parts = []
        for beta in dict.fromkeys(betas):
            rows = [row for row, other in enumerate(betas) if other == beta]
            some = None if etas is None else [etas[row] for row in rows]
            norm = ascent.take(rows).norm(some, draw.take(rows) if masks and draw is not None else None)
            parts.append(norm / math.sqrt(beta))
        return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))

    def _draw(self, ascent: Ascent) -> Draw | None:
        """The random numbers of a mask that the kernels draw, and of rounding."""
        betas = tuple(self.option(group, "beta") for group in ascent.groups)
        is_whole = self.mask == "tensor"
        if (
            self._given_mask is not None
            or all(beta == 1 for beta in betas)
            or (is_whole and capture.recorder() is None)
        ):
            return ascent.rounding()
        return ascent.draw(rounding=bool(self.stochastic_rounding), keep_probability=betas, whole=is_whole)

    @property
    def given_mask(self) -> list[bool | Tensor] | None:
        """The mask of the next steps in place of drawn ones, for parity checks; None draws.

        One entry for each parameter in group order: a bool, or with mask="element" a bool tensor of its shape. beta
        still divides the perturbation; ranks need equal masks. It is in no checkpoint.

        Raises:
            TypeError: when it is set, an entry is neither a bool nor a bool tensor.
            ValueError: when it is set, another number of entries, another shape, or elements under mask="tensor" or of
                sharded weights.
        """
        return None if self._given_mask is None else list(self._given_mask)

    @given_mask.setter
    def given_mask(self, mask: Sequence[bool | Tensor] | None) -> None:
        self._given_mask = None if mask is None else self._checked_mask(list(mask))
        # what captured steps compare with
        self.has_given_mask = mask is not None

    def _checked_mask(self, mask: list[bool | Tensor]) -> list[bool | Tensor]:
        params = self._params()
        if len(mask) != len(params):
            raise ValueError(f"given_mask needs an entry for each of the {len(params)} parameters, got {len(mask)}")
        for i, (m, p) in enumerate(zip(mask, params, strict=True)):
            if isinstance(m, bool):
                continue
            if not isinstance(m, Tensor) or m.dtype is not torch.bool:
                raise TypeError(f"given_mask[{i}] must be a bool or a bool tensor, got {shown(m)}")
            if self.mask == "tensor" or is_dtensor(p):
                raise ValueError(
                    f"given_mask[{i}] masks elements, which needs mask='element' and whole weights; pass a bool"
                )
            if m.shape != p.shape:
                raise ValueError(f"given_mask[{i}] must be of shape {list(p.shape)}, got {list(m.shape)}")
        return mask

    @property
    def last_selection(self) -> "Selection | None":
        """What the last `step(loss_fn, *batch)` or `backward(loss_fn, *batch)` masked and selected; see `Selection`.

        None where no rows were selected: gamma = 1, a step without a second pass, or another way of stepping.
        """
        losses = self._run.perturbed_losses
        if not losses or losses[0].selection is None:
            return None
        (rows, before), after, mask = losses[0].selection, losses[0].rows, self._last_mask
        kept = mask.of_tensors() if self.mask == "tensor" else mask.of_elements(self._params())
        # a captured step writes into its own tensors again
        return Selection(kept, rows.clone(), before.clone(), after.clone())

    # sharpness-sensitive data selection

    def select(self, loss_fn: Callable[..., Any], batch: tuple[Any, ...], first: Losses) -> Losses:
        """Return the losses of B+, the k rows whose loss the perturbation raises most (Eq. 6)."""
        if not self.needs_rows():
            self.last_selected_fraction = 1.0
            return super().select(loss_fn, batch, first)
        n = len(first)
        # Where nothing is perturbed no row is sharp, and the step is the base optimizer's.
        k = self._number_of_rows(n) if self.is_perturbed else n
        self.last_selected_fraction = k / n
        if k == n and not (self.strict and self.is_perturbed):
            return super().select(loss_fn, batch, first)
        if self.selection == "reuse":
            losses = check_losses(loss_fn(*batch), n)
            after = losses.detach()
            rows = self._rows(after, first, k)
            chosen = losses.take(rows)
        else:
            after = self.losses_without_backward(loss_fn, batch, n)
            rows = self._rows(after, first, k)
            self.replay()
            chosen = check_losses(loss_fn(*take_rows(batch, rows)), len(rows))
        chosen.of_all, after.selection = after, (rows, first.rows)
        return chosen

    def _leave_single(self) -> None:
        self.last_selected_fraction = 1.0
        super()._leave_single()

    def _number_of_rows(self, n: int) -> int:
        smallest = 2 if self.trains_batch_norm else 1
        return min(n, max(smallest, math.floor(self._gamma * n + 1e-6)))

    def _rows(self, after: Losses, before: Losses, k: int) -> Tensor:
        rows = ops.select_largest_increase(after.ranked(), before.rows, k)
        if not self.strict:
            return rows
        delta = (after.ranked() - before.rows)[rows]
        above = rows[delta > delta.min()]
        if not len(above):
            raise RuntimeError(
                f"strict=True found no row above the {k} largest deltas, which are all equal; use strict=False, or a "
                "larger gamma or batch"
            )
        self.last_selected_fraction = len(above) / len(before)
        return above

    # captures

    def why_not_capturable(self, scaler: Any) -> str | None:
        """Return why no step can be captured, if so."""
        if self.has_given_mask:
            return _DRAWS_ITS_MASKS
        return "strict=True reads the device" if self.strict else super().why_not_capturable(scaler)

    def is_warm(self) -> bool:
        """Return whether the next step has two passes."""
        # of many tensors a step that perturbs nothing never happens, and to look takes a while
        groups = [group for group in self.param_groups if self.option(group, "perturb")]
        chance = math.prod((1 - self.option(g, "beta")) ** sum(p.requires_grad for p in g["params"]) for g in groups)
        return not self.is_active or self.mask == "element" or chance < 2**-60 or self.has_second_pass()

    def static_outputs(self) -> list[tuple[Any, str]]:
        """Return what a step sets and every replay leaves as well."""
        return [*super().static_outputs(), (self, "last_selected_fraction")]

    def _replayed(self) -> None:
        super()._replayed()
        self._last_mask = self._next_mask(self.param_groups[0][STEP] - 1)
