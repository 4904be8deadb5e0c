"""What constructors check of their arguments: errors name the argument, its value and what it may be."""

import math
from collections.abc import Callable
from typing import Any

import torch

LARGEST = (2.0 - 2.0**-23) * 2.0**127
"""The largest float32. Kernels compute in float32, so that a larger number would be inf there."""
LARGEST_INTEGER = 2**63 - 1
"""The largest int64."""


def shown(value: Any) -> str:
    """Return a value for a message; a number of hundreds of digits, or a page of text, in short."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "an integer of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless an argument is True or False.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless an argument is one of these words.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
        choices: the words.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_number(name: str, value: Any, fits: Callable[[float], bool], words: str) -> None:
    """Raise TypeError unless an argument is a number, ValueError unless it is finite, fits, and is within float32.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
        fits: whether a number is in range.
        words: what `fits` says, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)} of type {type(value).__name__}")
    # an integer may be too large to be a float
    if not (-math.inf < value < math.inf and fits(value)):
        raise ValueError(f"{name} must be finite and {words}, got {shown(value)}")
    if abs(value) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:.3g}, the largest float32, got a larger number")


def check_radius(name: str, value: Any) -> None:
    """Raise TypeError unless a hyperparameter is a number, ValueError unless it is >= 0 and within float32.

    Args:
        name: of the hyperparameter, for the message.
        value: what the user gave.
    """
    check_number(name, value, lambda number: number >= 0, ">= 0")


def check_integer(name: str, value: Any, smallest: int | None = None, largest: int | None = None) -> None:
    """Raise TypeError unless an argument is an integer, ValueError if it is too small or too large.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
        smallest: that is allowed; None for any.
        largest: that is allowed; None for any.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {shown(value)} of type {type(value).__name__}")
    if smallest is not None and value < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {shown(value)}")
    if largest is not None and value > largest:
        raise ValueError(f"{name} must be at most {largest}, got {shown(value)}")


def check_seed(name: str, value: Any) -> None:
    """Raise TypeError unless a seed is an integer, ValueError unless it is one of 64 bits, signed or not.

    Args:
        name: of the argument, for the message.
        value: what the user gave.
    """
    # random numbers take it modulo 2^64
    check_integer(name, value, -(2**63), 2**64 - 1)


def check_clip(clip_grad_norm: Any) -> None:
    """Raise TypeError unless the largest norm of a clipped gradient is a number or None, ValueError unless positive."""
    if clip_grad_norm is None:
        return
    if isinstance(clip_grad_norm, bool) or not isinstance(clip_grad_norm, (int, float)):
        kind = type(clip_grad_norm).__name__
        raise TypeError(f"clip_grad_norm must be a number or None, got {shown(clip_grad_norm)} of type {kind}")
    if not clip_grad_norm > 0:
        raise ValueError(f"clip_grad_norm must be positive, got {clip_grad_norm}")
    if LARGEST < clip_grad_norm < math.inf:
        raise ValueError(f"clip_grad_norm must be at most {LARGEST:.3g}, the largest float32, got a larger number")


def check_grad_scale(grad_scale: Any) -> None:
    """Raise TypeError unless a loss scale is a number, a tensor or None, ValueError unless a number is positive."""
    if grad_scale is not None and not isinstance(grad_scale, torch.Tensor):
        check_number("grad_scale", grad_scale, lambda scale: scale > 0, "> 0")


def check_scaler(scaler: Any) -> None:
    """Raise TypeError unless something scales losses as torch.amp.GradScaler does, or is None."""
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("scale", "unscale_", "step")):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {shown(scaler)}")
