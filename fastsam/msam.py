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

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam.kernels.tensor_list import Backup
from fastsam.sam import SAM, check_choice
from fastsam.two_pass.batch import batch_size, split_rows
from fastsam.two_pass.gradients import put
from fastsam.two_pass.module_state import MeanUpdate, set_to_means
from fastsam.two_pass.vmap_shards import WAY_OUT, BatchedShards

PROBES = 3
"""Steps that execution="auto" takes in each way before it settles; the first of them only warms up."""
logger = logging.getLogger("fastsam")


class MSAM(SAM):
    """SAM on each shard of the batch by itself; the base optimizer steps with the mean of the shards' gradients.

    Takes the arguments of `SAM`, and exactly one of `num_shards` and `shard_size`. Steps are taken with
    `step(loss_fn, *batch)`, which cuts the batch; or with one `ascent()`/`descent()` pair for each shard and `step()`
    after the last, where cutting and weighting are yours. After a step the random number generators are where m first
    passes leave them, and `last_grad_norm` is a tensor of shape [m].

    Args:
        num_shards: the paper's m, at most the number of rows: the first n mod m shards have one row more. A knob of
            each group, of which the first group's counts.
        shard_size: rows of a shard, SAM's m; the last shard has what is left. A knob like num_shards.
        weighting: of the shards' gradients, where sizes differ. "sample": n_i/n, so that every row counts the same.
            "uniform": 1/m, as printed in the paper.
        bn_update: with `model`, how batch norm's running statistics move in a step. "mean": once, by the mean of the
            shards' statistics, each weighted by n_i/n. "sequential": m times, as if each shard were a batch.
        execution: "sequential" runs one shard after the other. "batched" runs them side by side: the same numbers to
            rounding, from one forward and backward where there were m, which pays where shards are too small to keep
            the machine busy; about 2 m copies of the weights are alive at a time. It needs `model`, equal shards,
            bn_update="mean", and a loss function that torch.func.vmap can run and that uses parameters through the
            model alone; dropout draws other masks than sequentially. "auto" takes its first steps in both ways in turn,
            waiting for the device to time them, and settles on the faster; where batching is refused it settles on
            "sequential". `execution_chosen` says which and why, and a checkpoint keeps the choice; two runs may choose
            otherwise, and then differ in rounding.

    Raises:
        TypeError: num_shards or shard_size is no integer; and what `SAM` raises.
        ValueError: num_shards or shard_size is not positive, both or neither are given, an unknown weighting,
            bn_update or execution, or a model that cannot be batched; and what `SAM` raises. In a step: fewer rows than
            shards, or one row in a shard where `model` has batch norm in training mode; if batched, unequal shards or
            batch norm with momentum=None.
    """

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
        execution: Literal["sequential", "batched", "auto"] = "sequential",
        **keywords: Any,
    ) -> None:
        check_choice("weighting", weighting, ("sample", "uniform"))
        check_choice("bn_update", bn_update, ("mean", "sequential"))
        check_choice("execution", execution, ("sequential", "batched", "auto"))
        if execution == "batched":
            _check_batchable(keywords.get("model"), bn_update)
        self.weighting, self.bn_update, self.execution = weighting, bn_update, execution
        self._own_knobs = {"num_shards": num_shards, "shard_size": shard_size, "batched": None}
        self._reason = "chosen before the checkpoint"
        self._probes: dict[bool, list[float]] = {False: [], True: []}
        super().__init__(params, base_optimizer, rho, adaptive, **keywords)

    def _check_knobs(self, knobs: dict[str, Any]) -> None:
        super()._check_knobs(knobs)
        given = {name: knobs[name] for name in ("num_shards", "shard_size") if knobs.get(name) is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if knobs.get("batched") not in (None, True, False):
            raise ValueError(f"batched is what execution='auto' chose, True or False, got {knobs['batched']!r}")
        if len(given) != 1 and {"num_shards", "shard_size"} <= knobs.keys():
            what = f"both num_shards={knobs['num_shards']} and shard_size={knobs['shard_size']}" if given else "neither"
            raise ValueError(
                f"pass num_shards (the paper's m: how many shards) or shard_size (rows in each), got {what}"
            )

    def _check_form(self, call: str) -> None:
        if call == "first_step()" or (call == "step(closure)" and not self._run.pairs):
            raise RuntimeError(
                f"{call} cannot cut the batch into shards; use opt.step(loss_fn, *batch), or for each shard "
                "`with opt.ascent(): ...` and `with opt.descent(): ...`, then opt.step()"
            )

    def _check_step(self, closure: Any, batch: tuple, scaler: Any, clip_grad_norm: float | None) -> None:
        super()._check_step(closure, batch, scaler, clip_grad_norm)
        if batch:
            self._check_sizes(batch_size(batch))

    def _is_settled(self) -> bool:
        return self.execution_chosen is not None

    def _check_sizes(self, n: int) -> None:
        sizes = self._sizes(n)
        if 0 in sizes:
            raise ValueError(
                f"num_shards={len(sizes)} is more than the {n} rows of the batch; pass fewer shards, or leave out a "
                "last batch that is too small (drop_last=True)"
            )
        if 1 in sizes and self._run.statistics.any_training():
            raise ValueError(
                f"a batch of {n} rows in {len(sizes)} shards leaves 1 row in a shard, and batch norm in training mode "
                "needs 2; pass larger shards, or leave out a last batch that is too small (drop_last=True)"
            )
        if self.execution == "batched" and len(set(sizes)) > 1:
            raise ValueError(
                f"execution='batched' needs equal shards, and {n} rows make shards of {max(sizes)} and {min(sizes)}; "
                f"pass another size, leave out a last batch of another size (drop_last=True), or {WAY_OUT}"
            )
        if self.execution == "batched" and self._run.statistics.any_cumulative():
            raise ValueError(f"execution='batched' cannot run batch norm with momentum=None; {WAY_OUT}")

    def _sizes(self, n: int) -> list[int]:
        """Rows of each shard of a batch of n."""
        m, size = (self.knob(self.param_groups[0], name) for name in ("num_shards", "shard_size"))
        if m is None:
            return [min(size, n - start) for start in range(0, n, size)]
        return [n // m + (i < n % m) for i in range(m)]

    def _passes_on_batch(self, loss_fn: Callable, batch: tuple, scaler: Any) -> Tensor:
        sizes = self._sizes(batch_size(batch))
        if self.execution == "auto":
            return self._passes_in_turn(loss_fn, batch, scaler, sizes)
        if self.execution == "batched":
            return self._batched_passes(loss_fn, batch, scaler, len(sizes))
        return self._sequential_passes(loss_fn, batch, scaler, sizes)

    def _sequential_passes(self, loss_fn: Callable, batch: tuple, scaler: Any, sizes: list[int]) -> Tensor:
        run, n = self._run, sum(sizes)
        first: list[Tensor] = []
        norms: list[Tensor | None] = []
        self._start_afresh()
        statistics = MeanUpdate(run.statistics.moving() if self.bn_update == "mean" else [])
        try:
            for i, (shard, size) in enumerate(zip(split_rows(batch, sizes), sizes, strict=True)):
                run.restore()  # from the shard before
                is_last = i == len(sizes) - 1  # whose backward reduces the sum of all shards between DDP's ranks
                share = size / n
                weight = share if self.weighting == "sample" else 1 / len(sizes)
                first.append(self._pair_on_batch(loss_fn, shard, scaler, weight, is_last))
                norms.append(run.last_grad_norm)
                statistics.add(share)
        except BaseException:
            run.abort()  # puts a second pass's statistics back, and must not come later
            statistics.rewind()
            raise
        statistics.finish()
        run.last_grad_norm = _stack(norms)
        return torch.cat(first).mean()

    # execution="auto"

    @property
    def execution_chosen(self) -> str | None:
        """What runs and why, e.g. "batched: 25.1 ms a step, sequential 45.3 ms"; None while "auto" is measuring."""
        if self.execution != "auto":
            return f"{self.execution}: as asked"
        batched = self.knob(self.param_groups[0], "batched")
        return None if batched is None else f"{'batched' if batched else 'sequential'}: {self._reason}"

    def _passes_in_turn(self, loss_fn: Callable, batch: tuple, scaler: Any, sizes: list[int]) -> Tensor:
        chosen = self.knob(self.param_groups[0], "batched")
        # a batch that cannot be batched, such as a smaller last one, decides nothing
        if chosen is False or len(set(sizes)) > 1 or self._run.statistics.any_cumulative():
            return self._sequential_passes(loss_fn, batch, scaler, sizes)
        # a choice from a checkpoint may meet a model that refuses it
        batched = chosen or len(self._probes[True]) < len(self._probes[False])
        start = 0.0 if chosen else self._now()
        try:
            if batched:
                _check_batchable(self.model, self.bn_update)
                loss = self._batched_passes(loss_fn, batch, scaler, len(sizes))
            else:
                loss = self._sequential_passes(loss_fn, batch, scaler, sizes)
        except (RuntimeError, ValueError) as error:
            if not batched or WAY_OUT not in str(error):
                raise
            self._run.abort()
            self._settle(False, str(error).removesuffix(f"; {WAY_OUT}"))
            return self._sequential_passes(loss_fn, batch, scaler, sizes)
        if chosen:
            return loss
        self._probes[batched].append(self._now() - start)
        if len(self._probes[True]) == PROBES:
            one, many = (min(times[1:]) for times in self._probes.values())
            self._settle(many < one, f"batched took {1e3 * many:.3g} ms a step, sequential {1e3 * one:.3g} ms")
        return loss

    def _settle(self, batched: bool, reason: str) -> None:
        self._reason = reason
        for group in self.param_groups:
            group[self._knob_keys["batched"]] = batched
        logger.info("mSAM's execution='auto' chose %s", self.execution_chosen)

    def _now(self) -> float:
        for device in {p.device for p in self._params() if p.is_cuda}:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _batched_passes(self, loss_fn: Callable, batch: tuple, scaler: Any, m: int) -> Tensor:
        run = self._run
        trained = [p for p in self._params() if p.requires_grad]
        scale = _unscaled if scaler is None else scaler.scale
        self._start_afresh()
        shards = BatchedShards(self.model, trained, loss_fn, batch, m)  # type: ignore[arg-type]
        self._enter_ascent()
        statistics = run.statistics.moving()
        losses, gradients, moved_statistics = shards.first_pass(statistics, scale)
        run.leave_ascent()
        weights = [p.detach().expand(m, *p.shape).clone() for p in trained]
        norms: list[Tensor | None] = []

        def perturb(params: list[Tensor], _: list[Tensor | None]) -> None:
            copies, grads = (dict(zip(trained, stacked, strict=True)) for stacked in (weights, gradients))
            for i in range(m):
                shards_own = [copies[p][i] if p in copies else p for p in params]
                self._perturb_params(shards_own, [grads[p][i] if p in grads else None for p in params])
                run.backup = Backup([])  # of weights that nobody restores
                norms.append(run.last_grad_norm)
            gradients.clear()

        run.enter_descent(perturb)
        d = shards.second_pass(weights, scale)
        run.leave_descent()
        put(trained, d)
        set_to_means(statistics, moved_statistics)
        run.last_grad_norm = _stack(norms)
        return losses.mean()


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def _stack(norms: list[Tensor | None]) -> Tensor | None:
    """Return the norms as one tensor, 0 for a shard without gradients; None if no shard has any."""
    known = [norm for norm in norms if norm is not None]
    return torch.stack([known[0].new_zeros(()) if n is None else n for n in norms]) if known else None


def _check_batchable(model: nn.Module | None, bn_update: str) -> None:
    if model is None:
        raise ValueError(f"execution='batched' swaps the model's tensors; pass model=, or {WAY_OUT}")
    if bn_update != "mean":
        raise ValueError(f"execution='batched' cannot update batch norm one shard after the other; {WAY_OUT}")
    if hasattr(model, "no_sync") or hasattr(model, "_orig_mod") or hasattr(model, "set_requires_gradient_sync"):
        raise ValueError(
            f"execution='batched' cannot swap the tensors below a {type(model).__name__}; pass a model that is neither "
            f"distributed nor compiled, or {WAY_OUT}"
        )
