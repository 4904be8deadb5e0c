"""MESA's teacher: how it is made, which of its tensors follows which of the model's, and what its answer is."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Pick = str | int | Callable[[Any], Tensor] | None
"""Where the logits are in what a model returns: a key or attribute, an index, a function; None for the usual places."""


def copy_of(student: nn.Module) -> nn.Module:
    """Return a deep copy of the model, or raise TypeError if there is none."""
    try:
        return copy.deepcopy(student)
    except Exception as error:
        raise TypeError(
            f"{type(student).__name__} cannot be deep-copied ({error}); build a second one and pass it as teacher="
        ) from error


def filled(teacher: Any, student: nn.Module) -> nn.Module:
    """Return a teacher that somebody has made, with the student's weights in it.

    Raises:
        TypeError: it is no module.
        ValueError: it shares tensors with the student, or has others.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    own, others = ({t.data_ptr() for t in _named(module).values() if t.numel()} for module in (teacher, student))
    if own & others:
        raise ValueError("teacher shares tensors with the model and could not lag behind it; build a second model")
    try:
        pairs = paired(teacher, student)
    except RuntimeError as error:
        raise ValueError(f"teacher is another kind of model: {error}") from None
    with torch.no_grad():
        for v, w in pairs:
            v.copy_(w)
    return teacher


def logits_of(output: Any, pick: Pick) -> Tensor:
    """Return the logits in what a model has returned, or raise TypeError if there are none."""
    try:
        found = _pick(output, pick)
    except (LookupError, TypeError, AttributeError) as error:
        kind = type(output).__name__
        raise TypeError(f"output={pick!r} picks nothing out of the {kind} that the model returns: {error!r}") from error
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returns {type(output).__name__}, of which MESA needs the logits: pass output=, a key, an index "
            "or a function that picks them"
        )
    return found


def _pick(output: Any, pick: Pick) -> Any:
    if callable(pick):
        return pick(output)
    if pick is not None:
        return output[pick] if isinstance(pick, int) or isinstance(output, Mapping) else getattr(output, pick)
    if isinstance(output, Tensor):
        return output
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def paired(teacher: nn.Module, student: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor of the teacher that the student has as well, beside the student's of the same name.

    A buffer that the teacher lacks or has of another shape it is given as a copy.

    Raises:
        RuntimeError: they do not have the same parameters.
    """
    averages, weights = _named(teacher), _named(student)
    if averages.keys() != weights.keys() or any(averages[name].shape != w.shape for name, w in weights.items()):
        _follow(teacher, averages, student, weights)
        averages = _named(teacher)
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for name, v in averages.items():
        if name in weights and pairs.setdefault(id(v), (v, weights[name]))[1] is not weights[name]:
            raise RuntimeError(f"{name} of the model is no longer tied as the teacher's; build MESA after that change")
    return list(pairs.values())


def _named(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and then buffers, by every name that they have."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {_plain(name): tensor for name, tensor in tensors}


def _plain(name: str) -> str:
    """Return a name without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


def _follow(teacher: nn.Module, averages: dict[str, Tensor], student: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the teacher the buffers that differ, or raise RuntimeError if parameters do."""
    differing = [name for name in weights if name not in averages or averages[name].shape != weights[name].shape]
    gone = [name for name in averages if name not in weights]
    parameters = {_plain(name) for module in (teacher, student) for name, _ in module.named_parameters()}
    if wrong := sorted(parameters.intersection([*differing, *gone])):
        raise RuntimeError(
            f"the model no longer has the teacher's parameters: {', '.join(wrong[:4])}{', ...' if wrong[4:] else ''} "
            "differ in name or shape. Build MESA after the change to the model, or with teacher="
        )
    modules = {_plain(name): module for name, module in teacher.named_modules()}
    for owner, name in (name.rpartition(".")[::2] for name in differing):
        if owner in modules:
            buffer = weights[f"{owner}.{name}" if owner else name].detach().clone()
            modules[owner].register_buffer(name, buffer)
