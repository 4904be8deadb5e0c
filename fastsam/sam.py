"""SAM: Sharpness-Aware Minimization (Foret et al. 2020, https://arxiv.org/abs/2010.01412).

    g     = grad L_B(w)
    eps   = rho g / ||g||_2                              (Eq. 2, p = 2)
    d     = grad L_B(w + eps)                            (Eq. 3)
    w    <- base step from w with d                      (Alg. 1)

With adaptive=True it is ASAM (Kwon et al. 2021, https://arxiv.org/abs/2102.11600), T = diag(|w|):

    eps   = rho T^2 g / ||T g||_2                        (Eq. 7)
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam.distributed.ddp import PerturbSync
from fastsam.distributed.dtensor import first_element, norm_over_ranks, shard_number
from fastsam.kernels import ops
from fastsam.kernels.philox import Draw
from fastsam.kernels.reference import E0
from fastsam.kernels.replay_tables import Refreshable
from fastsam.two_pass import capture
from fastsam.two_pass.optimizer import Ascended, TwoPassOptimizer
from fastsam.two_pass.wrapper import FROM_BASE

OFFICIAL_ETA, OFFICIAL_E0 = 0.01, 1e-16


class SAM(TwoPassOptimizer):
    """Sharpness-Aware Minimization around any first-order base optimizer, a drop-in `torch.optim.Optimizer`.

    Args:
        params: tensors, named tensors or groups, as for any torch optimizer. Groups may set `rho`, `adaptive` and
            `perturb` (False leaves the group's tensors out of the perturbation and its norm). With several values of
            rho the length of the whole perturbation is none of them: each group's part is scaled by its own.
        base_optimizer: class of the optimizer that takes the step, e.g. torch.optim.SGD; or "apex.FusedSGD" and the
            like for NVIDIA apex's, where installed. For an instance use `SAM.wrap`.
        rho: radius of the perturbation in the 2-norm over all tensors, >= 0. Default 0.05.
        adaptive: False for SAM; True for ASAM with `T = |w|` for every tensor; "official" for the ASAM paper's code:
            `T = |w| + 0.01` for tensors whose name contains "weight" and T = 1 for the others, which needs `model` or
            named parameters. ASAM wants a rho about ten times as large.
        model: the module that is trained, or its wrapper. With it the running statistics of batch norm are those of
            the first pass alone; without it they are yours to handle. It is held, not registered.
        perturb_sync: which ranks of a DistributedDataParallel model share a perturbation: "global" perturbs all alike,
            along the gradient of the whole batch; "replica" perturbs each along its own, unreduced, which is mSAM
            with one shard per rank and saves a reduction; a number g makes groups of g neighbouring ranks. Pass DDP's
            module as `model`, and build the optimizer on all ranks. DDP weighs ranks equally, whatever their batch
            sizes are. With fully_shard only "global" works.
        same_rng: draw the same random numbers (dropout) in both passes. `first_step`/`second_step` cannot.
        stochastic_rounding: "auto" or True round the perturbation of float16 and bfloat16 weights stochastically,
            since rounding to nearest drops most of it; False rounds to nearest. Shards of whole rows (fully_shard)
            round as the whole weights would on one process; shards of columns draw numbers of their own.
        check_finite: skip steps whose final gradient holds inf or NaN, and count them in `skipped_steps`. Costs one
            read of the gradient unless a GradScaler has looked already.
        seed: of the random numbers of stochastic rounding.
        **base_kwargs: the base optimizer's own arguments (lr, momentum, ...).

    Raises:
        TypeError: base_optimizer is no optimizer class, does not know a keyword, or an argument has the wrong type.
        ValueError: a negative or non-finite rho, no parameters, the same parameter twice in a group, a base that
            cannot work (LBFGS, SparseAdam, differentiable=True), or a perturb_sync that the model cannot have.

    Example::

        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)

        def losses(x, y):
            return F.cross_entropy(model(x), y, reduction="none")

        for x, y in loader:
            loss = opt.step(losses, x, y)
    """

    _own_knobs: Mapping[str, Any] = MappingProxyType({})
    """What a method that builds on this one adds to the knobs, set before its constructor calls ours."""

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        rho: float = 0.05,
        adaptive: bool | Literal["official"] = False,
        *,
        model: nn.Module | None = None,
        perturb_sync: PerturbSync = "global",
        same_rng: bool = True,
        stochastic_rounding: bool | Literal["auto"] = "auto",
        check_finite: bool = True,
        seed: int = 0,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive, "perturb": True, **self._own_knobs},
            model=model,
            perturb_sync=perturb_sync,
            same_rng=same_rng,
            stochastic_rounding=stochastic_rounding,
            check_finite=check_finite,
            seed=seed,
            base_kwargs=base_kwargs,
        )
        if self._is_official():
            self._names()  # raises now rather than in the first step

    @classmethod
    def wrap(cls, base_optimizer: Optimizer, rho: float = 0.05, adaptive: Any = False, **keywords: Any) -> "SAM":
        """Return SAM around an optimizer instance, which keeps its state; the keywords are those of the constructor."""
        return cls(FROM_BASE, base_optimizer, rho, adaptive, **keywords)  # type: ignore[arg-type]

    def _check_knobs(self, knobs: dict[str, Any]) -> None:
        rho, adaptive = knobs.get("rho", 0.0), knobs.get("adaptive", False)
        if isinstance(rho, bool) or not isinstance(rho, (int, float)):
            raise TypeError(f"rho must be a number, got {rho!r} of type {type(rho).__name__}")
        if not (rho >= 0 and math.isfinite(rho)):
            raise ValueError(f"rho must be finite and >= 0, got {rho}")
        if adaptive not in (False, True, "official"):
            raise ValueError(f"adaptive must be False, True or 'official', got {adaptive!r}")
        if not isinstance(knobs.get("perturb", True), bool):
            raise TypeError(f"perturb must be True or False, got {knobs['perturb']!r}")

    def _perturb(self, ascended: Ascended) -> Tensor:
        norm = self._norm(ascended)
        self._move(ascended, norm)
        return norm

    def _norm(self, ascended: Ascended) -> Tensor:
        return self._norm_over_ranks(ascended, None)

    def _norm_over_ranks(self, ascended: Ascended, draw: Draw | None) -> Tensor:
        adaptive = self._adaptive(ascended)

        def norm_of(rows: list[int]) -> Tensor:
            part, kernels = ascended.take(rows), ops.pick(ascended.weights)
            etas = None if adaptive is None else [adaptive[i] for i in rows]
            return kernels.norm(part.grads, part.weights, etas, draw and draw.take(rows))

        return norm_over_ranks(norm_of, ascended.spreads)

    @property
    def _refreshed(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self._knob_keys["rho"],)

    def _move(self, ascended: Ascended, norm: Tensor) -> None:
        backup = self._run.backup_of(ascended.weights)
        adaptive, draw = self._adaptive(ascended), self._draw(ascended)
        e0 = OFFICIAL_E0 if self._is_official() else E0
        kernels = ops.pick(ascended.weights)
        # a capture keeps the groups to look into, and no gradients, whose memory others may use
        radii = Refreshable(self._radii(ascended), partial(self._radii, replace(ascended, weights=[], grads=[])))
        kernels.perturb_(ascended.weights, ascended.grads, backup, norm, radii, adaptive, draw, e0)

    def _radii(self, ascended: Ascended) -> list[float]:
        """Rho of each tensor; negative where the objective is maximized."""
        radii = [self.knob(group, "rho") for group in ascended.groups]
        return [-r if group.get("maximize") else r for r, group in zip(radii, ascended.groups, strict=True)]

    def _draw(self, ascended: Ascended) -> Draw | None:
        rounds = self.stochastic_rounding and any(w.dtype.itemsize == 2 for w in ascended.weights)
        return self._draw_with(ascended) if rounds else None

    def _draw_with(self, ascended: Ascended, **options: Any) -> Draw:
        """Random numbers by each element's place in its whole tensor; a shard that is not one stretch has its own."""
        params = self._params()
        starts = [first_element(params[i]) for i in ascended.indices]
        indices = [
            i if start is not None else i + len(params) * shard_number(spread)
            for i, start, spread in zip(ascended.indices, starts, ascended.spreads, strict=True)
        ]
        firsts = tuple(start or 0 for start in starts)
        return Draw(ascended.seed, ascended.step, tuple(indices), starts=firsts, advance=capture.advance(), **options)

    def _is_official(self) -> bool:
        return any(self.knob(group, "adaptive") == "official" for group in self.param_groups)

    def _adaptive(self, ascended: Ascended) -> list[float | None] | None:
        """For each tensor eta of ASAM's T = |w| + eta, or None for T = 1; None altogether without ASAM."""
        kinds = [self.knob(group, "adaptive") for group in ascended.groups]
        if not any(kinds):
            return None
        names = self._names() if self._is_official() else []

        def eta(kind: Any, index: int) -> float | None:
            if kind == "official":
                return OFFICIAL_ETA if "weight" in names[index] else None
            return 0.0 if kind else None

        return [eta(kind, index) for kind, index in zip(kinds, ascended.indices, strict=True)]


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless an argument is one of these words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
