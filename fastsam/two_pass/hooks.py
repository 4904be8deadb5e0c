"""The hooks in which methods differ, in the order of a step, and what hooks use."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsam.arguments import check_flag
from fastsam.distributed.dtensor import local
from fastsam.two_pass.ascent import Ascent, as_real
from fastsam.two_pass.gradients import clear, put, take
from fastsam.two_pass.loss_function import check_losses
from fastsam.two_pass.losses import Losses, Pair
from fastsam.two_pass.module_state import modules_of
from fastsam.two_pass.passes import PassOptimizer


class MethodHooks(PassOptimizer):
    """What a method overrides, with what holds where it does not, and what its hooks may call.

    Hooks run with gradients switched off, but for `select`. In a step in which `when=` or rho is 0, which is the base
    optimizer's, none is called but `check_options`, `check` without rows, `needs_rows`, `has_radius` and `has_draws`.
    """

    state_holds_scale = False
    """Whether what `combine` keeps is proportional to the gradient, so that a loss scale has to be taken out of it."""

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for a bad hyperparameter, of those that are there, before anything is changed.

        Args:
            options: hyperparameters by name: the constructor's, those of one group, or of a checkpoint's group.
        """
        check_flag("perturb", options.get("perturb", True))

    def check(self, call: str, rows: int | None = None) -> None:
        """Raise RuntimeError or ValueError where the method cannot take its step in this form.

        Args:
            call: "the constructor", `"step(loss_fn, *batch)"`, "step(closure)", "ascent()", "first_step()", or "step()"
                where pairs of `ascent()` and `descent()` are finished.
            rows: of the batch, for `step(loss_fn, *batch)`.
        """

    def passes(self, batch: tuple[Any, ...]) -> list[Pair]:
        """Return the parts of the batch that are perturbed one after the other, each by itself. Default: one part."""
        return [Pair(batch)]

    def averages_statistics(self) -> bool:
        """Whether batch norm's statistics move once in a step of several pairs, by the mean of the pairs'.

        Default: no, each pair's first pass goes on from those that the pair before left.
        """
        return False

    def norm_of_pairs(self, norms: list[Tensor | None]) -> Tensor | None:
        """Return `last_grad_norm` of a step of these pairs. Default: the last one's."""
        return norms[-1]

    def needs_rows(self) -> bool:
        """Whether the loss function has to return one loss for each row; if not, their mean will do."""
        return False

    def needs_gradient(self) -> list[bool]:
        """Return for each parameter in group order whether the ascent needs its gradient. Default: `perturbed()`.

        Those of the others are not computed in the first pass of `step(loss_fn, *batch)` and `backward(loss_fn,
        *batch)`, where that changes nothing.
        """
        return self.perturbed()

    def has_first_pass(self) -> bool:
        """Whether the perturbation depends on a gradient; if not, `perturb` gets an ascent whose grads are None."""
        return True

    def has_draws(self) -> bool:
        """Whether the perturbation depends on random numbers, for which all ranks need the same seed.

        Default: where 16-bit weights round stochastically.
        """
        return self.stochastic_rounding and any(p.dtype.itemsize == 2 for p in self._params())

    def has_radius(self) -> bool:
        """Whether the groups' options let anything be perturbed; if not, the step is the base optimizer's."""
        return True

    def has_second_pass(self) -> bool:
        """Whether the step has a second pass. Must not change between a step's first pass and its end."""
        return True

    @abstractmethod
    def perturb(self, ascent: Ascent, k: int) -> Tensor | None:
        """Perturb the weights in place by one call of `ascent.move` or `ascent.add`, which save them first.

        Args:
            ascent: the tensors to perturb, and their gradients.
            k: how many ascents of this pair came before: 0, as long as a pair has one ascent.

        Returns:
            The gradient norm, 0-dim, for `last_grad_norm`; None if there is none.
        """

    def select(self, loss_fn: Callable[..., Any], batch: tuple[Any, ...], first: Losses) -> Losses:
        """Return the losses at the perturbed weights whose mean the second pass goes back from. Default: of all rows.

        Args:
            loss_fn: the user's.
            batch: its arguments, of n rows.
            first: the first pass's losses, detached: `rows` of shape [n], 0-dim where that is what the loss function
                returns, and their `weights`.
        """
        return check_losses(loss_fn(*batch), len(first) if first.rows.dim() else None)

    def combine(self, ascent: Ascent, d: list[Tensor]) -> None:
        """Change the gradient of a second pass, in place, into what the base optimizer shall step with.

        Of several pairs before one step each is combined by itself; unscaling and clipping come later. In a step
        without a second pass `d` is the only pass's gradient. State that is made here waits for `after_step`.

        Args:
            ascent: weights and first gradients; zeros where a tensor has none.
            d: gradients of the second pass, one for each weight; zeros where a tensor has none.
        """

    def skip(self) -> Tensor | None:
        """Return a 0-dim bool tensor that is true if the step is to be skipped; None for never."""
        return None

    def after_step(self, skipped: Tensor | None) -> None:
        """Renew the method's own state when the base optimizer's step is over.

        Args:
            skipped: 0-dim tensor on the device, not 0 if the step was skipped; None if nobody has looked.
        """

    # what hooks use, beside `option`

    def perturbed(self) -> list[bool]:
        """Return for each parameter in group order whether its group is perturbed."""
        wanted = [(self.option(group, "perturb"), group["params"]) for group in self.param_groups]
        return [is_wanted for is_wanted, params in wanted for _ in params]

    def any_rank(self, flag: Tensor | None) -> Tensor | None:
        """Return whether the flag, 0-dim, is set on any rank, where ranks perturb by themselves; else the flag."""
        return self._run.parallel_model.any(flag)

    def mean_over_ranks(self, found: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return what this rank has found for parameters, or the ranks' means where ranks perturb by themselves.

        Args:
            found: tensors by parameter; zeros where another rank has one and this has none.
        """
        if not self._run.parallel_model.is_local:
            return found
        params = [p for p, wanted in zip(self._params(), self.perturbed(), strict=True) if wanted and p.requires_grad]
        means = self._run.parallel_model.average_over_all(params, [found.get(p) for p in params])
        return {p: mean for p, mean in zip(params, means, strict=True) if mean is not None}

    def parameter_names(self) -> list[str]:
        """Return the names of all parameters in group order, from the groups or else from the model.

        Raises:
            ValueError: there are none.
        """
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        if not names and self.model is not None:
            name_of = {id(p): name for module in modules_of(self.model) for name, p in module.named_parameters()}
            names = [name_of.get(id(p), "") for p in self._params()]
        if not names or not all(names):
            raise ValueError("this option needs parameter names: pass model=, or model.named_parameters() as params")
        return names

    def replay(self) -> None:
        """Let one more forward of the second pass draw the first pass's random numbers and find its module state."""
        self._run.replay()

    def losses_without_backward(self, loss_fn: Callable[..., Any], batch: tuple[Any, ...], n: int) -> Losses:
        """Return the losses of one more forward of the second pass, of n rows, detached; no backward follows it.

        It runs as `ForwardAlone` says, on the first pass's draws, and leaves p.grad as it is.

        Args:
            loss_fn: the user's.
            batch: its arguments.
            n: their rows.

        Raises:
            TypeError: the loss function returned something else than n losses.
        """
        run, params = self._run, self._params()

        def forward() -> Losses:
            # DDP would wait for a backward.
            with run.parallel_model.no_sync() if torch.is_grad_enabled() else nullcontext():
                return check_losses(loss_fn(*batch), n, needs_grad=False)

        def rewind() -> None:
            torch.clear_autocast_cache()
            self.replay()

        # A loss that needs gradients inside may leave some in p.grad.
        grads = take(params)
        clear(params)
        try:
            losses = run.forward_alone(forward, rewind)
        finally:
            put(params, grads)
        # In torch 2.8 an autocast around the step keeps casts of the weights that were made without a gradient.
        torch.clear_autocast_cache()
        return losses.detach()

    @property
    def is_active(self) -> bool:
        """Whether the step that is under way, or else the next one, perturbs: neither `when=` nor rho is 0."""
        return self._run.is_active

    @property
    def radius_scale(self) -> float:
        """What `when=` multiplies the radius by in the step that is under way, or else in the next one."""
        return self._run.scale

    @property
    def is_perturbed(self) -> bool:
        """Whether weights are perturbed now, as far as the host knows: a gradient that is not finite perturbs none."""
        return self._run.backup.valid

    @property
    def trains_batch_norm(self) -> bool:
        """Whether a layer of `model` normalises by the statistics of its batch, which takes two rows."""
        return self._run.module_state.any_training()

    @property
    def pending(self) -> dict[Any, Any]:
        """What `combine` has found and `after_step` will keep; forgotten if the step fails."""
        return self._run.pending

    def unscaled(self, tensor: Tensor) -> Tensor:
        """Return a gradient without the loss scale that the step's backwards were run with, if it is known.

        With a caller's own backward it is what the first of them multiplied the loss by: the parts of one step keep
        their shares relative to each other.
        """
        return self._run.without_scale(tensor)

    def states_of(self, params: list[Tensor], name: str) -> list[Tensor]:
        """Return this rank's entries of the method's own tensor of this name for each parameter; zeros before any."""
        kept = [self._state_of(p, name) for p in params]
        return [as_real(local(torch.zeros_like(p) if s is None else s)) for p, s in zip(params, kept, strict=True)]

    def set_state(self, param: Tensor, name: str, value: Tensor, keep: Tensor) -> None:
        """Keep a tensor of the method's own for a parameter, in `state[param]`, so that checkpoints carry it.

        Many optimizers make their state in the first step, if there is none. So before the base has any for the
        parameter the tensor waits beside it, and a checkpoint made then does not hold it.

        Args:
            param: of the optimizer.
            name: the key is "fastsam_<name>".
            value: this rank's entries.
            keep: 0-dim bool tensor; where it is false, all stays as it was.
        """
        kept = self._state_of(param, name)
        if kept is None:
            kept = torch.zeros_like(param)
        entries = as_real(local(kept))
        entries.copy_(torch.where(keep.to(entries.device), value.to(entries.dtype), entries))
        if self.state.get(param) or self._run.base_stepped:
            self.state[param][f"fastsam_{name}"] = kept
            self._run.deferred_state.pop((id(param), name), None)
        else:
            self._run.deferred_state[id(param), name] = kept

    def _state_of(self, param: Tensor, name: str) -> Tensor | None:
        waiting = self._run.deferred_state.get((id(param), name))
        return self.state.get(param, {}).get(f"fastsam_{name}") if waiting is None else waiting
