"""mSAM: m-Sharpness-Aware Minimization (Behdin et al. 2022, https://arxiv.org/abs/2212.04343).

    S_1 ... S_m  = the batch B, cut into shards of n_i rows
    g_i          = grad L_Si(w)
    eps_i        = rho g_i / ||g_i||_2                   (each shard by its own norm)
    d            = sum_i n_i/n grad L_Si(w + eps_i)      (Eq. 7, which has 1/m for n_i/n)
    w           <- base step from w with d

One perturbation is alive at a time, and autograd adds each shard's gradient to the sum in p.grad: scratch is SAM's
backup and that sum, whatever m is. A shard after the first costs what SAM's norm and perturbation move and one plain
restore: 4 + 16 + 8 bytes per float32 parameter. That restore can be fused with nothing, for the next shard's first pass
needs w itself; the last shard's is part of the base step, as in SAM.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.arguments import check_choice, check_integer, shown
from fastsam.distributed.ddp import PerturbSync
from fastsam.sam import SAM, check_p
from fastsam.schedule import Schedule
from fastsam.two_pass.batch import Batch, batch_size, split_rows
from fastsam.two_pass.engine import scale_by
from fastsam.two_pass.loss_function import LossFunction
from fastsam.two_pass.losses import Losses, Pair
from fastsam.two_pass.module_state import Modules, as_one, set_to_means
from fastsam.two_pass.optimizer import OnBaseStep, TwoPassOptimizer
from fastsam.two_pass.vmap_shards import WAY_OUT, BatchedShards, check_batchable


class MSAM(SAM):
    """SAM on each shard of the batch by itself; the base optimizer steps with the mean of the shards' gradients.

    Takes the arguments of `SAM`, and exactly one of `num_shards` and `shard_size`. Steps are taken with
    `step(loss_fn, *batch)`, which cuts the batch; or with one `ascent()`/`descent()` pair for each shard and `step()`
    after the last, where cutting and weighting are yours; a single pair where num_shards is more makes SAM's step, and
    warns once. After a step the random number generators are where m first passes leave them, and `last_grad_norm` is a
    tensor of shape [m].

    Under DistributedDataParallel perturb_sync=None means "replica": every shard of every rank is perturbed by itself,
    and gradients cross the network once a step. The paper's m is then the number of ranks times num_shards. With
    "global" it is num_shards, shard i being the ranks' i-th shards together, and each ascent crosses the network too.

    Args:
        num_shards: the paper's m, at most the number of rows: the first n mod m shards have one row more. Set for
            each group, of which the first group's counts.
        shard_size: rows of a shard, SAM's m; the last shard has what is left. Set like num_shards.
        weighting: of the shards' gradients, where sizes differ. "sample": n_i/n, so that every row counts the same.
            "uniform": 1/m, as printed in the paper.
        bn_update: with `model`, how batch norm's running statistics move in a step. "mean": once, by the mean of the
            shards' statistics, each weighted by n_i/n. "sequential": m times, as if each shard were a batch.
        execution: "sequential" runs one shard after the other. "batched" runs them side by side: the same numbers to
            rounding, from one forward and backward where there were m, which pays where shards are too small to keep
            the machine busy; about 2 m copies of the weights are alive at a time. It needs `model`, equal shards,
            bn_update="mean", and a loss function that torch.func.vmap can run and that uses parameters through the
            model alone; dropout draws other masks than sequentially. `opt.backward` takes shards one after the other
            in any case, and has_aux=True is refused.

    Raises:
        TypeError: num_shards or shard_size is no integer; and what `SAM` raises.
        ValueError: num_shards or shard_size is not positive, both or neither are given, an unknown weighting,
            bn_update or execution, or a model that cannot be batched; and what `SAM` raises. In a step: fewer rows than
            shards, or one row in a shard where `model` has batch norm in training mode; if batched, unequal shards or
            batch norm with momentum=None.
    """

    perturb_sync_under_ddp = "replica"
    _warned_about_one_pair = False

    def __init__(
        self,
        params: Iterable,
        base_optimizer: type[Optimizer] | str,
        rho: float = 0.05,
        adaptive: Any = False,
        *,
        num_shards: int | None = None,
        shard_size: int | None = None,
        weighting: Literal["sample", "uniform"] = "sample",
        bn_update: Literal["mean", "sequential"] = "mean",
        execution: Literal["sequential", "batched"] = "sequential",
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
        check_choice("weighting", weighting, ("sample", "uniform"))
        check_choice("bn_update", bn_update, ("mean", "sequential"))
        check_choice("execution", execution, ("sequential", "batched"))
        if execution == "batched":
            check_batchable(as_one(model), bn_update)
        self.weighting, self.bn_update, self.execution = weighting, bn_update, execution
        TwoPassOptimizer.__init__(
            self,
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive, "num_shards": num_shards, "shard_size": shard_size},
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
        given = {name: options[name] for name in ("num_shards", "shard_size") if options.get(name) is not None}
        for name, value in given.items():
            check_integer(name, value, 1)
        if len(given) != 1 and {"num_shards", "shard_size"} <= options.keys():
            both = f"both num_shards={options['num_shards']} and shard_size={options['shard_size']}"
            raise ValueError(
                "pass num_shards (the paper's m: how many shards) or shard_size (rows in each), got "
                f"{both if given else 'neither'}"
            )

    def check(self, call: str, rows: int | None = None) -> None:
        """Raise RuntimeError where nothing can be cut, ValueError where the batch cannot be cut into these shards."""
        super().check(call, rows)
        if call in ("first_step()", "step(closure)"):
            raise RuntimeError(
                f"{call} cannot cut the batch into shards; use opt.step(loss_fn, *batch), or for each shard "
                "`with opt.ascent(): ...` and `with opt.descent(): ...`, then opt.step()"
            )
        if call == "step()" and self._run.pairs == 1 and (self._num_shards or 1) > 1:
            self._warn_about_one_pair()
        if rows is not None:
            self._check_sizes(self._sizes(rows))

    def _warn_about_one_pair(self) -> None:
        if self._warned_about_one_pair:
            return
        self._warned_about_one_pair = True
        warnings.warn(
            f"one ascent()/descent() pair is one shard, so that this step is SAM's, but num_shards={self._num_shards}: "
            "under contexts the pairs are the shards. Run a pair for each shard before step(), with its share of the "
            "rows and of the loss; or use opt.step(loss_fn, *batch), which cuts the batch; or pass num_shards=1",
            stacklevel=6,
        )

    @property
    def _num_shards(self) -> int | None:
        return self.option(self.param_groups[0], "num_shards")

    def _check_sizes(self, sizes: list[int]) -> None:
        n = sum(sizes)
        if 1 in sizes and self.trains_batch_norm:
            raise ValueError(
                f"a batch of {n} rows in {len(sizes)} shards leaves 1 row in a shard, and batch norm in training mode "
                "needs 2; pass larger shards, or leave out a last batch that is too small (drop_last=True)"
            )
        if self.execution == "batched" and len(set(sizes)) > 1:
            raise ValueError(
                f"execution='batched' needs equal shards, and {n} rows make shards of {max(sizes)} and {min(sizes)}; "
                f"pass another size, leave out a last batch of another size (drop_last=True), or {WAY_OUT}"
            )
        if self.execution == "batched" and self._run.module_state.any_cumulative():
            raise ValueError(f"execution='batched' cannot run batch norm with momentum=None; {WAY_OUT}")

    def _sizes(self, n: int) -> list[int]:
        """Rows of each shard of a batch of n; raises ValueError if there are fewer rows than shards."""
        m, size = (self.option(self.param_groups[0], name) for name in ("num_shards", "shard_size"))
        if m is None:
            return [min(size, n - start) for start in range(0, n, size)]
        if m > n:
            raise ValueError(
                f"num_shards={shown(m)} is more than the {n} rows of the batch; pass fewer shards, or leave out a last "
                "batch that is too small (drop_last=True)"
            )
        return [n // m + (i < n % m) for i in range(m)]

    def passes(self, batch: tuple[Any, ...]) -> list[Pair]:
        """Cut the batch into shards; each counts n_i/n, or 1/m."""
        n, alike = batch_size(batch), self.weighting == "uniform"
        sizes = self._sizes(n)
        parts = zip(split_rows(batch, sizes), sizes, strict=True)
        return [Pair(part, 1 / len(sizes) if alike else size / n, size / n, alike) for part, size in parts]

    def needs_rows(self) -> bool:
        """Return that shards are weighted by their rows."""
        return True

    def averages_statistics(self) -> bool:
        """Return whether batch norm's statistics move once in a step."""
        return self.bn_update == "mean"

    def norm_of_pairs(self, norms: list[Tensor | None]) -> Tensor | None:
        """Return the norms of all shards, shape [m], 0 for a shard without gradients; None if no shard has any."""
        known = [norm for norm in norms if norm is not None]
        return torch.stack([known[0].new_zeros(()) if n is None else n for n in norms]) if known else None

    def _passes_on_batch(self, loss_fn: LossFunction, batch: Batch, scaler: Any) -> Tensor:
        if self.execution == "batched" and loss_fn.has_aux:
            raise ValueError(f"has_aux=True goes with shards one after the other, but execution='batched'; {WAY_OUT}")
        if self.execution == "sequential" or not self.is_active:
            return super()._passes_on_batch(loss_fn, batch, scaler)
        trained = [p for p in self._params() if p.requires_grad]
        m = len(self._sizes(batch.n))
        shards = BatchedShards(as_one(self.model), trained, loss_fn, batch, m)  # type: ignore[arg-type]
        return self._batched_passes(shards, scaler)

    def _batched_passes(self, shards: BatchedShards, scaler: Any) -> Tensor:
        """Run all first passes at once, then all second ones, each shard at weights of its own."""
        self._start_on_batch(scaler)
        scale = scale_by(scaler)
        self._enter_ascent()
        statistics = self._run.module_state.statistics()
        losses, gradients, moved_statistics = shards.first_pass(statistics, scale)
        self._run.leave_ascent()
        weights = shards.copies_of_weights()
        norms: list[Tensor | None] = []

        def perturb(params: list[Tensor], _: list[Tensor | None]) -> None:
            for own, grads in shards.each(params, weights, gradients):
                self._perturb_params(own, grads)
                # Copies of weights that are not to be restored.
                self._run.drop_backup()
                norms.append(self._run.last_grad_norm)
            gradients.clear()

        self._run.enter_descent(perturb)
        perturbed, d = shards.second_pass(weights, scale)
        self._run.perturbed_losses = [Losses(perturbed)]
        self._run.leave_descent()
        shards.put_gradients(d)
        set_to_means(statistics, moved_statistics)
        self._run.last_grad_norm = self.norm_of_pairs(norms)
        return losses.mean()
