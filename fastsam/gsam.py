"""GSAM: Surrogate Gap Guided SAM (Zhuang et al. 2022, https://arxiv.org/abs/2203.08065).

    rho_t   = rho_min + (rho - rho_min) (lr_t - lr_min) / (lr_max - lr_min)
    g       = grad L_B(w)
    eps     = rho_t g / ||g||_2
    g_adv   = grad L_B(w + eps)
    g_perp  = g - (g . g_adv / ||g_adv||^2) g_adv
    d       = g_adv - alpha g_perp
    w      <- base step from w with d

Descending along -g_perp raises the loss at w without changing that at w + eps, so the gap between them closes. Products
and norms are over all perturbed tensors and ranks.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.arguments import check_radius
from fastsam.distributed.ddp import PerturbSync
from fastsam.sam import SAM
from fastsam.schedule import Schedule
from fastsam.two_pass.ascent import Ascent
from fastsam.two_pass.module_state import Modules
from fastsam.two_pass.optimizer import OnBaseStep, TwoPassOptimizer


class GSAM(SAM):
    """SAM that also closes the gap between the loss and the perturbed loss.

    Takes the arguments of `SAM`, and:

    Args:
        rho: radius of the perturbation, and where it follows the learning rate its largest, at lr_max.
        alpha: how far d goes against the part of g that is orthogonal to g_adv, in [0, 1]. Default 0.4. 0 with a
            constant rho is SAM. Where the base optimizer has an alpha of its own (RMSprop), this is GSAM's; set the
            base's with `wrap`.
        rho_min: radius at lr_min, from which rho_t follows the group's learning rate linearly, and stays between both
            outside of lr_min to lr_max. None for a constant rho. Needs lr_max.
        lr_max: largest learning rate of the schedule, above or equal to lr_min.
        lr_min: smallest one. Default 0.

    Raises:
        ValueError: alpha outside [0, 1], rho_min without lr_max or the reverse, lr_min above lr_max; and what `SAM`
            raises.
        TypeError: a number is none; and what `SAM` raises.

    Both passes must have the same loss scale, as they have in `step(loss_fn, *batch, scaler=)` and under contexts;
    `first_step` and `second_step` cannot tell, and want gradients without one.
    """

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        rho: float = 0.05,
        adaptive: bool | Literal["official"] = False,
        *,
        alpha: float = 0.4,
        rho_min: float | None = None,
        lr_max: float | None = None,
        lr_min: float | None = None,
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
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {
                "rho": rho,
                "adaptive": adaptive,
                "alpha": alpha,
                "rho_min": rho_min,
                "lr_max": lr_max,
                "lr_min": lr_min,
            },
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
        if options.get("alpha", 0.0) > 1:
            raise ValueError(f"alpha must be in [0, 1], got {options['alpha']}")
        rule = {name: options.get(name) for name in ("rho_min", "lr_max", "lr_min")}
        for name, value in rule.items():
            if value is not None:
                check_radius(name, value)
        if {"rho_min", "lr_max"} <= options.keys() and (rule["rho_min"] is None) != (rule["lr_max"] is None):
            raise ValueError(
                f"rho_min and lr_max go together, got rho_min={rule['rho_min']} and lr_max={rule['lr_max']}: rho "
                "follows the learning rate from rho_min at lr_min to rho at lr_max"
            )
        if rule["lr_max"] is not None and (rule["lr_min"] or 0.0) > rule["lr_max"]:
            raise ValueError(f"lr_min must be at most lr_max, got {rule['lr_min']} and {rule['lr_max']}")

    def has_radius(self) -> bool:
        """Whether rho, or the rho_min that it falls to, is not 0 in a group that is perturbed."""
        wanted = [group for group in self.param_groups if self.option(group, "perturb")]
        return super().has_radius() or any(self.option(group, "rho_min") for group in wanted)

    def radius(self, group: dict[str, Any]) -> float:
        """Return rho_t of a group, at its learning rate, times what `when=` scales it by."""
        rho, rho_min, lr_max = (self.option(group, name) for name in ("rho", "rho_min", "lr_max"))
        lr_min = self.option(group, "lr_min") or 0.0
        if rho_min is None or lr_max == lr_min:
            return self.radius_scale * rho
        rho_t = rho_min + (rho - rho_min) * (float(group["lr"]) - lr_min) / (lr_max - lr_min)
        return self.radius_scale * max(min(rho, rho_min), min(rho, rho_t))

    def combine(self, ascent: Ascent, d: list[Tensor]) -> None:
        """Subtract alpha g_perp from g_adv: d = -alpha g + (1 + alpha g . g_adv / ||g_adv||^2) g_adv."""
        g, g_adv = ascent.grads, d
        square = ascent.dot(g_adv, g_adv)
        along = ascent.dot(g, g_adv) / square
        # without a direction there is no orthogonal part, and what is not finite is left to the check of d
        defined = torch.isfinite(along) & (square > 0) & torch.isfinite(ascent.dot(g, g))
        zero = torch.zeros_like(along)
        alphas = [zero + self.option(group, "alpha") for group in ascent.groups]
        ascent.blend(
            g_adv,
            [torch.where(defined, 1 + alpha * along, 1.0) for alpha in alphas],
            g,
            [torch.where(defined, -alpha, zero) for alpha in alphas],
        )

    @property
    def refreshed(self) -> tuple[str, ...]:  # type: ignore[override]
        """Keys of the groups that a captured step follows: rho_t goes by the learning rate."""
        return (*super().refreshed, "lr")

    def why_not_capturable(self, scaler: Any) -> str | None:
        """Return why no step can be captured, if so."""
        follows = any(self.option(group, "rho_min") is not None for group in self.param_groups)
        if follows and any(isinstance(group["lr"], Tensor) and group["lr"].is_cuda for group in self.param_groups):
            return "rho follows a learning rate that lies on the device"
        return super().why_not_capturable(scaler)
