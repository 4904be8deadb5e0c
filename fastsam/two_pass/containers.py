"""What a batch may be nested in: mappings, sequences, named tuples and dataclasses, taken apart and rebuilt."""

import copy
import dataclasses
from collections import UserDict, UserList, UserString, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

_TEXT = (str, bytes, bytearray, memoryview, UserString)
_BUILTIN = (dict, list, tuple)
_SAME_CLASS = (list, tuple, UserList, deque)


def is_sequence(node: Any) -> bool:
    """Whether something is a sequence whose entries are alike in kind: no text, no named tuple, no torch.Size."""
    if isinstance(node, (list, tuple)):
        return not hasattr(node, "_fields") and not isinstance(node, torch.Size)
    return isinstance(node, Sequence) and not isinstance(node, _TEXT)


def parts(node: Any) -> list[Any] | None:
    """Return what a container holds, in order; None for what is no container, such as a tensor, a text, an object."""
    if isinstance(node, Mapping):
        return [node[key] for key in node]
    if is_sequence(node) or (isinstance(node, tuple) and not isinstance(node, (PackedSequence, torch.Size))):
        return list(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [getattr(node, field.name) for field in dataclasses.fields(node)]
    return None


def labels(node: Any) -> list[str]:
    """Return how Python reads each of the `parts`, for messages: "['x']", "[0]" or ".x"."""
    if isinstance(node, Mapping):
        return [f"[{key!r}]" for key in node]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [f".{name}" for name in node._fields]
    if dataclasses.is_dataclass(node) and not is_sequence(node):
        return [f".{field.name}" for field in dataclasses.fields(node)]
    return [f"[{i}]" for i in range(len(node))]


def rebuild(node: Any, values: Sequence[Any]) -> Any:
    """Return a new container of the same class that holds these values in place of the `parts`.

    A sequence may get another length. One that is neither list, tuple, UserList nor deque becomes a list.
    """
    if isinstance(node, Mapping):
        held = dict(zip(node, values, strict=True))
        if type(node) is dict:
            return held
        if not isinstance(node, (dict, UserDict)):
            return type(node)(held)  # type: ignore[call-arg]
        new = copy.copy(node)
        for key, value in held.items():
            new[key] = value
        return new
    if isinstance(node, tuple) and hasattr(node, "_make"):
        return node._make(values)
    if is_sequence(node):
        return type(node)(values) if isinstance(node, _SAME_CLASS) else list(values)
    new = copy.copy(node)
    for field, value in zip(dataclasses.fields(node), values, strict=True):
        # a frozen dataclass forbids the plain way
        object.__setattr__(new, field.name, value)
    return new


def can_be_rebuilt(node: Any) -> bool:
    """Whether `rebuild` makes an equal container of one with the same parts."""
    if type(node) in _BUILTIN or (is_sequence(node) and not isinstance(node, _SAME_CLASS)):
        return True
    values = parts(node) or []
    try:
        again = parts(rebuild(node, values)) or []
    except Exception:
        return False
    return len(again) == len(values) and all(a is b for a, b in zip(again, values, strict=True))
