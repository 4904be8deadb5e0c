"""The stages of a sharpness-aware step over lists of tensors: one function each, and who computes it.

A function checks its arguments, splits its lists and dispatches: what the Triton kernels can walk goes to their
launchers, as launches; everything else to the reference implementation in plain torch. Both have the same names as
here. The way of the data is gradients -> `norm` -> `perturb_` -> second gradients -> `restore_*_step_`.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any, ParamSpec

import torch
from torch import Tensor

from fastsam.kernels import reference, replay_tables
from fastsam.kernels.calls import Call, run_all
from fastsam.kernels.past import Past, check_loss
from fastsam.kernels.philox import Draw
from fastsam.kernels.reference import E0, AdamOptions, SGDOptions
from fastsam.kernels.tensor_list import Backup

_P = ParamSpec("_P")

BACKENDS = ("triton", "torch")
_LOSSES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_chosen: str | None = None
# Looked up once: it takes longer than all the rest of `_pick`.
_is_interpreting = "TRITON_INTERPRET" in os.environ


def _running(name: str, calls_of: Callable[_P, list[Call]]) -> Callable[_P, None]:
    """Return a stage by this name that runs what `calls_of` prepares, of the same arguments."""

    @wraps(calls_of)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        run_all(calls_of(*args, **kwargs))

    run.__name__ = run.__qualname__ = name
    run.__doc__ = f"Run what `{calls_of.__name__}` returns, of the same arguments."
    return torch.no_grad()(run)


@torch.no_grad()
def norm(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    adaptive: Sequence[float | None] | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """Return ||m T g||_2 over all tensors, T = 1 or |w| + eta (SAM Eq. 2 with p = 2; ASAM Eq. 4; ESAM's mask m).

    Args:
        grads: floating-point tensors of any shapes, dtypes and devices; at least one.
        weights: tensors of the same shapes; needed only with `adaptive`.
        adaptive: for each tensor eta of T = |w| + eta, or None for T = 1; None altogether means T = 1.
        draw: random numbers of the mask, if it has `keep_probability`; None means m = 1.

    Returns:
        0-dim float64 tensor on the first tensor's device. Squares are summed in float64, so entries from 1e-20 to
        1e20 neither overflow nor vanish; a non-finite entry gives a non-finite norm.

    Raises:
        ValueError: there is no gradient.
    """
    _check_any(grads)
    etas = _etas(adaptive, grads)
    walked = (grads, weights) if etas.count(None) < len(etas) else (grads,)
    kernels, launches, rest = _split(*walked)
    parts = []
    if rest:
        some = _take(rest, *walked)
        parts.append(reference.norm(some[0], some[-1], _take(rest, etas)[0], _part_of(draw, launches, rest)))
    if launches:
        parts += kernels.norm(launches, etas, draw)
    return _joined(parts, grads[0], torch.linalg.vector_norm)


@torch.no_grad()
def found_nonfinite(grads: Sequence[Tensor]) -> Tensor:
    """Return 1.0 if any entry of any tensor is inf or NaN, else 0.0.

    Args:
        grads: floating-point tensors of any shapes, dtypes and devices; at least one.

    Returns:
        0-dim float32 tensor on the first tensor's device.

    Raises:
        ValueError: there is no gradient.
    """
    _check_any(grads)
    kernels, launches, rest = _split(grads)
    parts = [reference.found_nonfinite(*_take(rest, grads))] if rest else []
    if launches:
        parts += kernels.found_nonfinite(launches)
    return _joined(parts, grads[0], torch.amax)


@torch.no_grad()
def perturb_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    backup: Backup,
    norm: Tensor,
    rho: Sequence[float],
    adaptive: Sequence[float | None] | None = None,
    draw: Draw | None = None,
    e0: float = E0,
) -> None:
    """Save `weights` into `backup` and add eps = rho m T^2 g / (norm + e0) to them, T = 1 or |w| + eta.

    SAM Eq. 2 with p = 2; ASAM Eq. 7; ESAM Eq. 5 with its mask m and rho / beta for rho. A norm that is zero, inf or
    NaN gives eps = 0.

    Args:
        weights: tensors to perturb in place; the storage stays where it is.
        grads: their gradients, of the same shapes.
        backup: made for exactly `weights`; becomes valid.
        norm: 0-dim tensor, ||T g||_2 over all tensors.
        rho: for each tensor its radius; a negative one perturbs downhill (maximize).
        adaptive: for each tensor eta of T = |w| + eta, or None for T = 1; None altogether means T = 1.
        draw: random numbers of the mask, and for rounding the sum stochastically to 16-bit weights; None means m = 1
            and rounding to nearest.
        e0: added to the norm.

    Raises:
        RuntimeError: in a capture, if the kernels cannot walk a tensor.
    """
    etas = _etas(adaptive, weights)
    kernels, launches, rest = _split(weights, grads, backup.tensors)
    if rest:
        replay_tables.refuse_reference(rest, weights)
        some_weights, some_grads, some_rho, some_etas = _take(rest, weights, grads, rho, etas)
        some_backup, some_draw = backup.part(rest) if launches else backup, _part_of(draw, launches, rest)
        reference.perturb_(some_weights, some_grads, some_backup, norm, some_rho, some_etas, some_draw, e0)
    if launches:
        kernels.perturb_(launches, backup, norm, rho, etas, draw, e0)
        torch.autograd.graph.increment_version(weights)


@torch.no_grad()
def select_largest_increase(after: Tensor, before: Tensor, k: int) -> Tensor:
    """Return the rows of the k largest after - before, ascending (ESAM's B+, Eq. 6).

    Among equal differences the lower row goes first; a NaN comes after every number.

    Args:
        after: per-sample losses, a vector of float64, float32, float16 or bfloat16; 16-bit differences are float32.
            The kernel takes up to 65,536, the reference any number.
        before: as `after`, in its dtype and on its device.
        k: how many rows, at least 1 and at most all.

    Returns:
        int64 vector of length k.

    Raises:
        ValueError: shapes, dtypes or devices differ, k is out of range, or there are more losses than the kernel takes.
    """
    if after.dim() != 1 or after.shape != before.shape:
        raise ValueError(
            f"losses must be two vectors of one length, got shapes {tuple(after.shape)} and {tuple(before.shape)}"
        )
    if after.dtype not in _LOSSES or after.dtype != before.dtype:
        raise ValueError(
            "losses must both be float64, float32, float16 or bfloat16, the same one, "
            f"got {after.dtype} and {before.dtype}; convert them"
        )
    if after.device != before.device:
        raise ValueError(f"losses must be on one device, got {after.device} and {before.device}")
    if not isinstance(k, int) or not 1 <= k <= len(after):
        raise ValueError(f"k must be an integer from 1 to the number of losses, {len(after)}, got {k!r}")
    return _pick([after]).select_largest_increase(after, before, k)


@torch.no_grad()
def restore_(backup: Backup) -> None:
    """Copy the backup back into the weights that still wait for it, bit for bit. Idempotent.

    Args:
        backup: as `perturb_` left it; invalid afterwards.
    """
    if backup.valid:
        copy_(*backup.pending())
        backup.discard()


def copy_calls(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Call]:
    """Return the calls that copy each source into its target, bit for bit.

    Tensors of one width on one device are copied in one launch.

    Args:
        targets: tensors to write, of any dtypes; the storage stays where it is. There may be none.
        sources: tensors of the same shapes, dtypes and devices.
    """
    if not targets:
        return []
    kernels, launches, rest = _split(targets, sources, by_width=True)
    calls = reference.restore_calls(*_take(rest, targets, sources)) if rest else []
    if launches:
        calls += [*kernels.restore_calls(launches), _new_version(targets)]
    return calls


copy_ = _running("copy_", copy_calls)


@torch.no_grad()
def sgd_step_calls(
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    options: Sequence[SGDOptions],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Call]:
    """Return the calls that set each weight to its source, then take torch.optim.SGD's step from there.

    Args:
        weights: tensors to update in place.
        sources: for each weight its backup, or the weight itself where it was not perturbed.
        grads: final gradients; divided in place by `grad_scale` if given.
        momentum_buffers: updated in place, zeros before the first step; None where momentum is 0.
        options: hyperparameters for each tensor.
        grad_scale: 0-dim float32 tensor, a GradScaler's scale; None means the gradients are unscaled.
        found_inf: 0-dim float32 tensor; where it is not 0, weights are restored and nothing else changes.

    Raises:
        RuntimeError: in a capture, if the kernels cannot walk a tensor.
    """
    lists = weights, sources, grads, momentum_buffers
    kernels, launches, rest = _split(*lists)
    calls: list[Call] = []
    if rest:
        replay_tables.refuse_reference(rest, weights)
        some = _take(rest, *lists, options)
        calls += reference.sgd_step_calls(*some, grad_scale=grad_scale, found_inf=found_inf)
    if launches:
        calls += [*kernels.sgd_step_calls(launches, options, grad_scale, found_inf), _new_version(weights)]
    return calls


restore_sgd_step_ = _running("restore_sgd_step_", sgd_step_calls)


@torch.no_grad()
def adam_step_calls(
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor | None],
    steps: Sequence[Tensor],
    options: Sequence[AdamOptions],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Call]:
    """Return the calls that set each weight to its source, then take torch.optim.Adam's or AdamW's step from there.

    Args:
        weights: tensors to update in place.
        sources: for each weight its backup, or the weight itself where it was not perturbed.
        grads: final gradients; divided in place by `grad_scale` if given.
        exp_avgs: first moments, updated in place.
        exp_avg_sqs: second moments, updated in place.
        max_exp_avg_sqs: largest second moments so far, updated in place by the reference; None without amsgrad.
        steps: 0-dim float32 step counters on the weights' devices, advanced in place.
        options: hyperparameters for each tensor.
        grad_scale: 0-dim float32 tensor, a GradScaler's scale; None means the gradients are unscaled.
        found_inf: 0-dim float32 tensor; where it is not 0, weights are restored and nothing else changes.

    Raises:
        RuntimeError: in a capture, if the kernels cannot walk a tensor, or with amsgrad.
    """
    lists = weights, sources, grads, exp_avgs, exp_avg_sqs

    def refused() -> tuple[bool, ...]:
        # The last program of a parameter advances its step, and an empty parameter has no program.
        pairs = zip(max_exp_avg_sqs, weights, strict=True)
        return tuple([largest is not None or not w.numel() for largest, w in pairs])

    kernels, launches, rest = _split(*lists, refused=refused)
    calls: list[Call] = []
    if rest:
        replay_tables.refuse_reference(rest, weights)
        some = _take(rest, *lists, max_exp_avg_sqs, steps, options)
        calls += reference.adam_step_calls(*some, grad_scale=grad_scale, found_inf=found_inf)
    if launches:
        calls += [*kernels.adam_step_calls(launches, steps, options, grad_scale, found_inf), _new_version(weights)]
    return calls


restore_adam_step_ = _running("restore_adam_step_", adam_step_calls)


def _new_version(tensors: Sequence[Tensor]) -> Call:
    """Return the call that tells autograd what a kernel has changed."""
    return partial(torch.autograd.graph.increment_version, tensors)


@torch.no_grad()
def trajectory_loss(
    logits: Tensor,
    targets: Tensor,
    past: Past | None,
    *,
    tau: float,
    weight: float,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy + weight KL(softmax(past / tau) || softmax(logits / tau)), and its gradient.

    A class whose past or target probability is 0 adds nothing. One whose current probability is 0, but whose past or
    target probability is not, makes the loss inf; its gradient is finite, as torch's is.

    Args:
        logits: [n, C] float64, float32, float16 or bfloat16.
        targets: int64 [n], or floating class probabilities [n, C].
        past: what to compare with; None means cross-entropy alone. A history's rows are read before they are
            overwritten, and where `past.record` is set the logits are recorded whatever their targets' kind.
        tau: temperature of the KL.
        weight: factor of the KL; tau^2 is the caller's.
        label_smoothing: s of the target (1 - s) onehot + s / C.
        ignore_index: rows with this target get loss and gradient 0, and neither count nor are recorded.
        reduction: "mean" over the rows not ignored, "sum" or "none".

    Returns:
        loss: 0-dim, or [n] for "none"; float64 for float64 logits, else float32.
        gradient: [n, C] of each row's own loss, in the logits' dtype.
        scale: 0-dim in the loss's dtype, by which a reduced loss's gradient differs from that: for "mean" 1 / rows
            that count, 0 where none does; else 1.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        IndexError: a target is not a class (a kernel makes that row's loss and gradient NaN instead).
    """
    check_loss(logits, targets, past, tau, reduction)
    return _pick_for_rows(logits).trajectory_loss(
        logits, targets, past, tau=tau, weight=weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


@torch.no_grad()
def record_(logits: Tensor, past: Past, targets: Tensor | None = None, ignore_index: int = -100) -> None:
    """Record the logits in the history, as `trajectory_loss` would.

    Args:
        logits: [n, C] float64, float32, float16 or bfloat16.
        past: a history; `wanted` and `record` do not matter.
        targets: only needed for rows to be ignored; int64 [n], or class probabilities, which ignore none.
        ignore_index: rows with this target are not recorded.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if past.ids is None:
        raise ValueError("only a history records, and this past has no ids")
    check_loss(logits, targets, past)
    _pick_for_rows(logits).record_(logits, past, targets, ignore_index)


@torch.no_grad()
def ema_calls(
    averages: Sequence[Tensor], values: Sequence[Tensor], decay: float, found_inf: Tensor | None = None
) -> list[Call]:
    """Return the calls that set each average v to decay v + (1 - decay) w (MESA Eq. 10).

    Args:
        averages: floating tensors to update in place; computed in float64 where either side is, else in float32.
        values: tensors of the same shapes on the same devices, of any floating dtypes.
        decay: from 0 to 1.
        found_inf: 0-dim tensor; where it is not 0 the averages stay as they are.

    Raises:
        ValueError: decay is out of range.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be from 0 to 1, got {decay}")
    kernels, launches, rest = _split(averages, values)
    calls: list[Call] = []
    if rest:
        some_averages, some_values = _take(rest, averages, values)
        calls += reference.ema_calls(some_averages, some_values, decay, found_inf)
    if launches:
        calls += [*kernels.ema_calls(launches, decay, found_inf), _new_version(averages)]
    return calls


ema_ = _running("ema_", ema_calls)


def set_backend(name: str | None) -> None:
    """Choose the implementation of the fused work for every optimizer of this process.

    Args:
        name: "torch" for the reference implementations, "triton" for the Triton kernels, None for the default: Triton
            where it can run on the tensors at hand, else torch. Tensors on the CPU are left to torch in any case,
            unless Triton interprets its kernels.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend cannot run here.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}, or None")
    if name == "triton":
        kernels = _triton_backend()
        if kernels is None:
            raise RuntimeError("backend 'triton' cannot run: triton is not installed; use 'torch' or None")
        if not kernels.INTERPRETED and not _has_gpu():
            raise RuntimeError(
                "backend 'triton' cannot run: no GPU with a driver that Triton knows; use 'torch' or None, or set "
                "TRITON_INTERPRET=1 before fastsam is imported to interpret the kernels on the CPU"
            )
    _chosen = name


def uses_triton(tensors: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels serve these tensors, or would but for their dtypes and layouts."""
    return _pick(tensors) is not reference


def _pick(tensors: Sequence[Tensor]) -> ModuleType:
    """Return the implementation that serves these tensors; of the kernels, those that they can walk.

    Raises:
        RuntimeError: tensors on a GPU while Triton interprets its kernels, which would read the GPU's addresses here.
    """
    if _chosen == "torch":
        return reference
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is None and (not tensors or (_chosen is None and not _is_interpreting)):
        return reference
    kernels = _triton_backend()
    if kernels is None:
        return reference
    if kernels.INTERPRETED:
        if device is not None:
            raise RuntimeError(
                f"a tensor is on {device}, but Triton interprets its kernels, which only works on the CPU; unset "
                "TRITON_INTERPRET before fastsam is imported, or call set_backend('torch')"
            )
        return kernels
    if device is None or (_chosen is None and not _is_supported(device)):
        return reference
    return kernels


def _pick_for_rows(logits: Tensor) -> ModuleType:
    """Return the implementation that serves a matrix of logits, of which there may be none."""
    kernels = _pick([logits])
    return kernels if kernels is reference or (len(logits) and kernels.runs_here(logits)) else reference


def _split(
    *lists: Sequence[Tensor | None], by_width: bool = False, refused: Callable[[], tuple[bool, ...]] = tuple
) -> tuple[Any, list[Any], Sequence[int]]:
    """Return the Triton kernels, the launches that they serve, and the positions that are left to the reference.

    Args:
        lists: the tensors of each parameter that a kernel walks side by side; None only behind the first list.
        by_width: whether dtypes of one width are alike, as for a kernel that moves bits.
        refused: returns for each position whether to leave it to the reference in any case, or nothing.
    """
    kernels = _pick(lists[0])  # type: ignore[arg-type]
    if kernels is reference:
        return None, [], range(len(lists[0]))
    return kernels, *kernels.split(*lists, by_width=by_width, refused=refused())


def _take(positions: Sequence[int], *lists: Sequence[Any]) -> list[Any]:
    """Return the items of each list at these positions; the list itself where these are all."""
    return [items if len(positions) == len(items) else [items[i] for i in positions] for items in lists]


def _part_of(draw: Draw | None, launches: Sequence[Any], rest: Sequence[int]) -> Draw | None:
    """Return the draw for the positions that are left to the reference, which are all where nothing is launched."""
    return draw if draw is None or not launches else draw.take(rest)


def _etas(adaptive: Sequence[float | None] | None, tensors: Sequence[Tensor]) -> tuple[float | None, ...]:
    return (None,) * len(tensors) if adaptive is None else tuple(adaptive)


def _check_any(grads: Sequence[Tensor]) -> None:
    if not grads:
        raise ValueError("there must be at least one gradient, got an empty list")


def _joined(parts: list[Tensor], first: Tensor, join: Any) -> Tensor:
    """Return what `join` makes of the results of all devices, on the first tensor's."""
    if len(parts) == 1:
        return parts[0].to(first.device)
    return join(torch.stack([part.to(first.device) for part in parts]))


@cache
def _triton_backend() -> ModuleType | None:
    """The Triton launchers; None without triton. Imported on first use, since importing fastsam must not need it."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from fastsam.kernels import triton_backend

    return triton_backend


def _has_gpu() -> bool:
    from triton.backends import backends

    return any(backend.driver.is_active() for backend in backends.values())


@cache
def _is_supported(device: torch.device) -> bool:
    """Whether Triton compiles for this GPU: AMD's, and NVIDIA's from Ampere on."""
    return _has_gpu() and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0))
