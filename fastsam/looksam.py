"""LookSAM: SAM's direction kept over several steps (Liu et al. 2022, https://arxiv.org/abs/2203.02714).

    t mod k == 0:   g, eps, g_adv as in SAM;   g_v = g_adv - (g . g_adv / ||g||^2) g;   d = g_adv
    else:           g = grad L_B(w);   d = g + alpha (||g|| / (||g_v|| + 1e-8)) g_v

g_v is the part of SAM's gradient that is orthogonal to the plain one, which changes more slowly than both. k - 1 of k
steps have a single pass. t counts steps, taken or skipped, without those in which `when=` or rho is 0: g_v stands still
there, and the period with it. The first step that perturbs is SAM's.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.arguments import check_choice, check_integer, check_radius
from fastsam.distributed.ddp import PerturbSync
from fastsam.sam import SAM
from fastsam.schedule import Schedule
from fastsam.two_pass.ascent import Ascent
from fastsam.two_pass.module_state import Modules
from fastsam.two_pass.optimizer import OnBaseStep, TwoPassOptimizer
from fastsam.two_pass.wrapper import ACTIVE

E0 = 1e-8
"""Added to ||g_v|| in the denominator."""


class LookSAM(SAM):
    """SAM in every k-th step; in the others a plain gradient, corrected by what the last SAM step has found.

    `needs_second_pass` tells loops with contexts or two calls which kind of step comes next. The correction g_v is kept
    for each parameter as `state[p]["fastsam_g_v"]`, in its dtype, and is part of checkpoints. Takes the arguments of
    `SAM`, and:

    Args:
        rho: radius of the perturbation. Default 0.1.
        k: a SAM step every so many steps, >= 1. Default 5. 1 is SAM.
        alpha: how much of the correction is added, >= 0. Default 0.7. Where the base optimizer has an alpha of its own
            (RMSprop), this is LookSAM's; set the base's with `wrap`.
        scope: "global" takes products and norms over all perturbed tensors and ranks, "tensor" of each tensor by
            itself, as pytorch_optimizer's LookSAM does.

    Raises:
        TypeError: k is no integer; and what `SAM` raises.
        ValueError: k below 1, a negative alpha, an unknown scope; and what `SAM` raises.
        RuntimeError: a SAM step by contexts under a GradScaler without `ascent(grad_scale=)`: the correction must not
            hold the loss scale. `first_step` and `second_step` cannot tell, and want gradients without one.
    """

    state_holds_scale = True

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        rho: float = 0.1,
        adaptive: bool | Literal["official"] = False,
        *,
        k: int = 5,
        alpha: float = 0.7,
        scope: Literal["global", "tensor"] = "global",
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
        check_choice("scope", scope, ("global", "tensor"))
        self.scope = scope
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive, "k": k, "alpha": alpha},
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
        check_radius("alpha", options.get("alpha", 0.0))
        check_integer("k", options.get("k", 1), 1)

    def has_second_pass(self) -> bool:
        """Return whether this is a SAM step: every k-th, of which the first group's k counts."""
        group = self.param_groups[0]
        return group[ACTIVE] % self.option(group, "k") == 0

    def combine(self, ascent: Ascent, d: list[Tensor]) -> None:
        """In a SAM step find g_v, which waits for the step's end; in the others add it to the gradient."""
        if self.has_second_pass():
            self._find(ascent, d)
        else:
            self._correct(ascent, d)

    def _find(self, ascent: Ascent, g_adv: list[Tensor]) -> None:
        g = ascent.grads
        squares, products = self._dots(ascent, g, g), self._dots(ascent, g, g_adv)
        spoils = ~torch.isfinite(torch.stack([*squares, *products])).all()
        self.pending["spoils"] = spoils | self.pending.get("spoils", spoils)
        # 0 where there is no plain gradient to be orthogonal to
        exists = [square > 0 for square in squares]
        g_v = [d.clone() for d in g_adv]
        along = [torch.where(e, p / s, 0.0) for e, p, s in zip(exists, products, squares, strict=True)]
        ascent.blend(g_v, exists, g, [-a for a in along])
        for p, v in zip(ascent.params, g_v, strict=True):
            v = self.unscaled(v)
            self.pending[p] = v + self.pending[p] if p in self.pending else v

    def _correct(self, ascent: Ascent, g: list[Tensor]) -> None:
        g_v = self.states_of(ascent.params, "g_v")
        lengths, kept = self._dots(ascent, g, g), self._dots(ascent, g_v, g_v)
        factors = [
            self.option(group, "alpha") * length.sqrt() / (square.sqrt() + E0)
            for group, length, square in zip(ascent.groups, lengths, kept, strict=True)
        ]
        # a gradient that is not finite is left to the check of d
        usable = [torch.where(torch.isfinite(factor), factor, 0.0) for factor in factors]
        ascent.blend(g, [torch.ones_like(factor) for factor in factors], g_v, usable)

    def _dots(self, ascent: Ascent, some: list[Tensor], others: list[Tensor]) -> list[Tensor]:
        """Return the product that counts for each tensor: of all of them, or of each by itself."""
        n = len(some)
        if self.scope == "global":
            return [ascent.dot(some, others)] * n
        return [ascent.take([i]).dot([some[i]], [others[i]]) for i in range(n)]

    def is_warm(self) -> bool:
        """Return whether the next step has a single pass, which a capture stands for; SAM's run as usual."""
        return not self.is_active or self.option(self.param_groups[0], "k") == 1 or not self.has_second_pass()

    def after_step(self, skipped: Tensor | None) -> None:
        """Keep the g_v that a SAM step has found, unless the step was skipped or its gradients were not finite.

        Where ranks perturb by themselves it is the mean of theirs, so that a checkpoint of one rank serves all.
        """
        if not self.has_second_pass():
            return
        spoils = self.pending.get("spoils")
        found = self.mean_over_ranks({p: g_v for p, g_v in self.pending.items() if isinstance(p, Tensor)})
        has_found = self.any_rank(None if spoils is None else torch.ones_like(spoils))
        spoils = self.any_rank(spoils)
        # A step without passes; where ranks perturb by themselves the flag says so.
        if spoils is None or has_found is None:
            return
        keep = ~spoils & has_found
        if skipped is not None:
            keep = keep & (skipped == 0).to(keep.device)
        for p, g_v in found.items():
            self.set_state(p, "g_v", g_v, keep)
