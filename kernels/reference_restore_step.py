"""Reference implementations of the restore of the weights and of SGD's step from there; and what every step shares."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.kernels.calls import Call, run_all
from fastsam.kernels.reference_common import arithmetic_dtype, place
from fastsam.kernels.tensor_list import buckets, same_layout


class SGDOptions(NamedTuple):
    """Hyperparameters of torch.optim.SGD for one tensor; without momentum there is no buffer."""

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False


def restore_(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Copy the copies back into the weights, bit for bit."""
    run_all(restore_calls(weights, copies))


def restore_calls(weights: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Call]:
    """Return the calls that copy the copies back into the weights, bit for bit."""
    # A list of several dtypes would be copied tensor by tensor.
    return [
        partial(torch._foreach_copy_, [weights[i] for i in rows], [copies[i] for i in rows])
        for rows in buckets(w.dtype for w in weights)
    ]


def restore_sgd_step_(*lists: Any, **scalars: Any) -> None:
    """Set each weight to its source and take SGD's step from there; see `ops.restore_sgd_step_`."""
    run_all(sgd_step_calls(*lists, **scalars))


def sgd_step_calls(
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    options: Sequence[SGDOptions],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[Call]:
    """Return the calls of SGD's step; see `ops.sgd_step_calls`."""
    calls = restore_from(weights, sources)
    for positions in alike(options, weights, grads, momentum_buffers):
        o, first = options[positions[0]], weights[positions[0]]
        buffers = [b for i in positions if (b := momentum_buffers[i]) is not None]
        lists = DenseLists(*([source[i] for i in positions] for source in (weights, sources, grads)), buffers)
        step = partial(
            torch._fused_sgd_, *lists.tensors,
            weight_decay=o.weight_decay, momentum=o.momentum, lr=o.lr, dampening=o.dampening,
            nesterov=o.nesterov, maximize=o.maximize, is_first_step=False,
            grad_scale=to_device_of(first, grad_scale), found_inf=skip_flag(first, found_inf),
        )  # fmt: skip
        calls += [step, *lists.write_back()]
    return calls


def restore_from(weights: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Call]:
    """Return the call that sets each weight to its source; none where all are the weights themselves."""
    positions = [i for i, (w, s) in enumerate(zip(weights, sources, strict=True)) if w is not s]
    if not positions:
        return []
    return restore_calls([weights[i] for i in positions], [sources[i] for i in positions])


def to_device_of(like: Tensor, scalar: Tensor | None) -> Tensor | None:
    """Return the scalar on the device of `like`; None stays None."""
    return None if scalar is None else scalar.to(like.device, non_blocking=True)


def skip_flag(like: Tensor, found_inf: Tensor | None) -> Tensor | None:
    """Return 1 or 0 on the device of `like`, as torch's fused steps want it: on the CPU they skip at 1 alone."""
    return None if found_inf is None else (found_inf != 0).to(like.device, torch.float32, non_blocking=True)


def alike(options: Sequence[tuple], *lists: Sequence[Tensor | None]) -> list[list[int]]:
    """Positions of parameters that one call serves: of a device, a dtype and options, all fusable or none."""
    distinct = {id(o): o for o in options}
    # Tensors compare elementwise, so two options with a tensor lr are alike only if it is the same tensor.
    keys = {i: tuple(id(x) if isinstance(x, Tensor) else x for x in o) for i, o in distinct.items()}
    kinds: list[Any] = [None] * len(options)
    if not _are_uniform(lists):
        present = ([t for t in row if t is not None] for row in zip(*lists, strict=True))
        kinds = [(*place(row[0]), len(row), _is_fusable(*row)) for row in present]
    return buckets((keys[id(o)], kind) for o, kind in zip(options, kinds, strict=True))


def _are_uniform(lists: Sequence[Sequence[Tensor | None]]) -> bool:
    """Whether all tensors are contiguous, of one device and dtype, and of one shape in each row: most often they are.

    Lists, asked as a whole, answer many times faster than their rows.
    """
    present = [tensors for tensors in lists if any(t is not None for t in tensors)]
    everything: list[Any] = [t for tensors in present for t in tensors if t is not None]
    shapes = [[t.shape for t in tensors if t is not None] for tensors in present]
    return (
        all(own == shapes[0] for own in shapes)
        and all(map(Tensor.is_contiguous, everything))
        and len(set(map(place, everything))) <= 1
    )


def _is_fusable(*tensors: Tensor) -> bool:
    """Whether torch's fused kernels, which walk memory, treat these tensors of one parameter right."""
    if tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.float16, torch.bfloat16):
        # On the CPU torch 2.13's _fused_sgd_ leaves most of a 16-bit weight as it was.
        return False
    return same_layout(tensors) and all(t.dtype == tensors[0].dtype for t in tensors)


class DenseLists:
    """The same lists in one layout and dtype: themselves where they agree already, else copies to be written back.

    Args:
        weights: what the step changes.
        sources: what the weights are set to before; copies are theirs.
        lists: gradients and state.
    """

    def __init__(self, weights: list[Tensor], sources: list[Tensor], *lists: list[Tensor]) -> None:
        self.originals = self.tensors = (weights, *lists)
        filled = [tensors for tensors in self.originals if tensors]
        if not _is_fusable(*(tensors[0] for tensors in filled)):
            wide = arithmetic_dtype(weights[0].dtype)
            self.tensors = tuple([t.to(wide).contiguous() for t in tensors] for tensors in (sources, *lists))

    def write_back(self) -> list[Call]:
        """Return the calls that copy what the copies hold into their originals."""
        pairs = zip(chain(*self.originals), chain(*self.tensors), strict=True)
        return [partial(original.copy_, tensor) for original, tensor in pairs if original is not tensor]
