"""SAM: Sharpness-Aware Minimization (Foret et al. 2020, https://arxiv.org/abs/2010.01412).

    g     = grad L_B(w)
    eps   = rho g / ||g||_2                              (Eq. 2, p = 2)
    d     = grad L_B(w + eps)                            (Eq. 3)
    w    <- base step from w with d                      (Alg. 1)

With another p, 1/p + 1/q = 1:

    eps   = rho sign(g) (|g| / ||g||_q)^(q-1)            (Eq. 2; dual_norm.py)

With adaptive=True it is ASAM (Kwon et al. 2021, https://arxiv.org/abs/2102.11600), T = diag(|w|):

    eps   = rho T^2 g / ||T g||_2                        (Eq. 7)
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.arguments import check_radius, shown
from fastsam.distributed.ddp import PerturbSync
from fastsam.kernels.reference import E0
from fastsam.schedule import Schedule
from fastsam.two_pass.ascent import Ascent
from fastsam.two_pass.dual_norm import direction
from fastsam.two_pass.module_state import Modules
from fastsam.two_pass.optimizer import OnBaseStep, TwoPassOptimizer

OFFICIAL_ETA, OFFICIAL_E0 = 0.01, 1e-16


def check_p(p: Any) -> None:
    """Raise TypeError or ValueError unless this is the p of a norm."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p must be a number, got {shown(p)}")
    # an integer beyond float64's range is no number here
    if not p >= 1 or (isinstance(p, int) and p > sys.float_info.max):
        raise ValueError(f"p must be at least 1, or math.inf, got {shown(p)}")


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
        model: the module that is trained, or its wrapper; or a sequence of modules. With it every forward of a step
            starts from the buffers that the step found, and the step ends with what its first pass left: running
            statistics, codebooks, queues, spectral norm's vectors, whatever kind of module moves them, and frozen
            parameters that a forward moves, which are searched for in a few first steps and in every 256th (a wait
            each). After a step that fails all are what they were before it. Without it they are yours to handle. It
            is held, not registered.
        p: of the norm that rho bounds, at least 1; math.inf perturbs every entry by rho, with its gradient's sign; 1
            perturbs one entry of all, the first with the largest gradient, and takes whole weights (no fully_shard).
            With ASAM the norm is that of eps / T. Radii are those of the norm: for inf about 1/sqrt(P) of the 2-norm's,
            for P weights. Other values than 2 are computed by torch, not in fastsam's kernels.
        perturb_sync: which ranks of a DistributedDataParallel (or `replicate()`) model share a perturbation: "global"
            perturbs all alike, along the gradient of the whole batch; "replica" perturbs each along its own, unreduced,
            which is mSAM with one shard per rank and saves a reduction; a number g makes groups of g neighbouring
            ranks. None means "global", but for `MSAM` under DDP. Pass DDP's module as `model`. DDP weighs ranks
            equally, whatever their batch sizes are. With fully_shard only "global" works. Looked up when the first
            step begins, on all ranks together: process groups and wrappers may come after the optimizer.
        same_rng: draw the same random numbers (dropout) in both passes: from torch's generators on all devices,
            Python's `random`, NumPy's global generator and `generators`. `first_step`/`second_step` cannot. Global
            generators from which another thread draws meanwhile are not supported.
        generators: torch.Generator, random.Random, numpy.random.Generator and RandomState objects that the loss
            function draws from.
        stochastic_rounding: "auto" or True round the perturbation of float16 and bfloat16 weights stochastically,
            since rounding to nearest drops most of it; False rounds to nearest. Shards of whole rows (fully_shard)
            round as the whole weights would on one process; shards of columns draw numbers of their own.
        check_finite: skip steps whose final gradient holds inf or NaN, and count them in `skipped_steps`. Costs one
            read of the gradient unless a GradScaler has looked already.
        when: which steps perturb: `fastsam.schedule.Every`, `Last` or `First`, or an object of your own with
            `scale(step)` in [0, 1], which multiplies rho; None perturbs in all. Steps are counted from 0, taken or
            skipped, and the count is saved with the groups. A step of scale 0, or of rho = 0 in every perturbed group,
            is the base optimizer's, bit for bit, with one forward and backward: `needs_second_pass` is False then, and
            `step()` alone takes it. The scale is looked at when a step begins.
        on_base_step: what `step()` does where no pass of fastsam's came before, so that the base optimizer alone would
            step, as in the loops of frameworks that know nothing of two passes: "raise" RuntimeError with what to call
            instead, "warn" once, or "ignore". Steps with lr 0, without gradients and without a second pass
            (`needs_second_pass`) are never refused; an optimizer that has perturbed weights before only warns once,
            but for gradients that its last step has used already.
        keep: what a forward moves beside `model`'s buffers and is to be kept to one forward as well: tensors, and
            objects with state_dict() and load_state_dict().
        seed: of the random numbers of stochastic rounding.
        **base_kwargs: the base optimizer's own arguments (lr, momentum, ...).

    Raises:
        TypeError: base_optimizer is no optimizer class, does not know a keyword, or an argument has the wrong type.
        ValueError: a negative or non-finite rho, no parameters, the same parameter twice in a group, a base that
            cannot work (LBFGS, SparseAdam, differentiable=True), or weights of FSDP1. In the first step: a perturb_sync
            that the model cannot have, or seeds that differ between ranks that draw the same numbers.

    Example::

        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, model=model, lr=0.1, momentum=0.9)

        def losses(x, y):
            return F.cross_entropy(model(x), y, reduction="none")

        for x, y in loader:
            loss = opt.step(losses, x, y)
    """

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        rho: float = 0.05,
        adaptive: bool | Literal["official"] = False,
        *,
        model: Modules = None,
        p: float = 2.0,
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
        check_p(p)
        self._p = float(p)
        super().__init__(
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive},
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

    @property
    def p(self) -> float:
        """Of the norm that rho bounds."""
        # No default of the class, which would hide the optimizer's own from a framework's proxy.
        return getattr(self, "_p", 2.0)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for a bad rho or adaptive."""
        super().check_options(options)
        check_radius("rho", options.get("rho", 0.0))
        adaptive = options.get("adaptive", False)
        if not isinstance(adaptive, bool) and not (isinstance(adaptive, str) and adaptive == "official"):
            raise ValueError(f"adaptive must be False, True or 'official', got {shown(adaptive)}")

    def has_radius(self) -> bool:
        """Whether rho of a group that is perturbed is not 0."""
        return any(self.option(group, "rho") > 0 for group in self.param_groups if self.option(group, "perturb"))

    def check(self, call: str, rows: int | None = None) -> None:
        """Raise ValueError where adaptive="official" has no names to go by."""
        if call == "the constructor" and self._is_official():
            self.parameter_names()

    def perturb(self, ascent: Ascent, k: int) -> Tensor:
        """Compute ||T g||_q, and move w by the step of Eq. 2, for p = 2 rho T^2 g / ||T g||_2 (ASAM's Eq. 7)."""
        etas = self.etas(ascent)
        if self.p != 2:
            steps, norm = direction(ascent, self.p, etas)
            # a norm of NaN perturbs nothing
            one = torch.where(torch.isfinite(norm), 1.0, torch.nan).double()
            replace(ascent, grads=steps).move(one, self.radius, e0=0.0)
            return norm
        norm = ascent.norm(etas)
        ascent.move(norm, self.radius, etas, e0=self.e0)
        return norm

    def radius(self, group: dict[str, Any]) -> float:
        """Return rho of a group's perturbation, times what `when=` scales it by."""
        return self.radius_scale * self.option(group, "rho")

    @property
    def e0(self) -> float:
        """What is added to the norm in the denominator."""
        return OFFICIAL_E0 if self._is_official() else E0

    @property
    def refreshed(self) -> tuple[str, ...]:  # type: ignore[override]
        """Keys of the groups that a captured step follows."""
        return (self._option_keys["rho"],)

    def etas(self, ascent: Ascent) -> list[float | None] | None:
        """Return for each tensor eta of ASAM's `T = |w| + eta`, or None for T = 1; None altogether without ASAM."""
        kinds = [self.option(group, "adaptive") for group in ascent.groups]
        if not any(kinds):
            return None
        names = self.parameter_names() if self._is_official() else []

        def eta(kind: Any, index: int) -> float | None:
            if kind == "official":
                return OFFICIAL_ETA if "weight" in names[index] else None
            return 0.0 if kind else None

        return [eta(kind, index) for kind, index in zip(kinds, ascent.indices, strict=True)]

    def _is_official(self) -> bool:
        return any(self.option(group, "adaptive") == "official" for group in self.param_groups)
