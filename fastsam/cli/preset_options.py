"""What a preset sets on the command line: everything that was not typed, or a refusal that names what to type."""

from collections.abc import Collection, Mapping
from typing import Any

from fastsam.cli.config import SCHEDULES, flag, options_of
from fastsam.cli.errors import InputError
from fastsam.cli.models import MODELS
from fastsam.methods import METHODS
from fastsam.presets import METHOD_OPTIONS, Preset

OF_THE_RUN = ("epochs", "batch_size", "schedule", "clip", "label_smoothing", "label_noise", "freeze_bn")
"""Settings that are options of the commands under the same name, beside the methods'."""


def settings_of(preset: Preset, typed: Mapping[str, Any], swept: Collection[str] = ()) -> dict[str, Any]:
    """Return the values of all options that the preset sets, those typed left out.

    Args:
        preset: the settings.
        typed: options that were typed, with their values.
        swept: options that take several values.

    Raises:
        InputError: an option must be typed, since the paper does not give it or the command line cannot follow it;
            or the preset is of another method or base.
    """
    own = set(typed) | set(swept)
    method = _method(preset, typed)
    _check_base(preset, typed)
    _refuse_what_has_no_option(preset, method)
    _refuse_gaps(preset, own)
    _refuse_what_is_not_here(preset, own)
    values = {name: preset.values[name].value for name in preset.values}
    found = {"method": method, "base": preset.base, "model": values.get("model")}
    found |= {name: values[name] for name in (*OF_THE_RUN, *options_of(method, preset.base)) if name in values}
    if "warmup" in values:
        # a share of the epochs there
        found["warmup"] = values["warmup"] * typed.get("epochs", values.get("epochs"))
    if method != preset.method:
        found["num_shards"] = _shards(preset, typed)
    return {name: value for name, value in found.items() if name not in own}


def about(preset: Preset, method: str) -> list[str]:
    """Return what a user has to know of a preset, each a line.

    Args:
        preset: the settings.
        method: that the run trains with.
    """
    lines = [f"{preset.name}: {preset.paper}", *preset.notes]
    if preset.shard_size and method == "sam":
        lines.append(
            f"A perturbation there is that of {preset.shard_size} samples, not of the batch; --method msam beside the "
            "preset takes as many."
        )
    return lines


def _method(preset: Preset, typed: Mapping[str, Any]) -> str:
    method = typed.get("method", preset.method)
    if method == preset.method or (method == "msam" and preset.method == "sam" and preset.shard_size):
        return method
    raise InputError(f"{preset.name} is for {preset.method}, not for {method}; leave --method out")


def _check_base(preset: Preset, typed: Mapping[str, Any]) -> None:
    if typed.get("base", preset.base) != preset.base:
        raise InputError(f"{preset.name} is around {preset.base}, not around {typed['base']}; leave --base out")


def _refuse_gaps(preset: Preset, typed: Collection[str]) -> None:
    missing = [name for name in preset.gaps if name not in typed and name != "data"]
    if missing:
        raise InputError(preset.refusal(missing, {name: f"{flag(name)} ..." for name in missing}))


def _refuse_what_has_no_option(preset: Preset, method: str) -> None:
    # what a row's class is always given is set without an option
    here = (*options_of(method), *METHODS[method].fixed)
    if beyond := [name for name in METHOD_OPTIONS[preset.method] if name in preset.values and name not in here]:
        raise InputError(
            f"{preset.name} sets {', '.join(beyond)}, for which there is no option; build it in Python with "
            f'presets.load("{preset.name}").method_keywords()'
        )


def _refuse_what_is_not_here(preset: Preset, typed: Collection[str]) -> None:
    values = preset.values
    if "model" in values and "model" not in typed and values["model"].value not in MODELS:
        raise InputError(f"{preset.name} is for {values['model'].value}, which is not built here; pass --model")
    if "schedule" in values and "schedule" not in typed and values["schedule"].value not in SCHEDULES:
        raise InputError(f"{preset.name} has a {values['schedule'].value} schedule, which is not here; pass --schedule")
    if "data" not in typed:
        data = f"is for {values['data'].value}" if "data" in values else "names no data"
        raise InputError(f"{preset.name} {data}; pass --data, as in --data cifar10:DIR")
    if ("freeze_bn" in values or "pretrained" in values) and "init" not in typed:
        raise InputError(f"{preset.name} fine-tunes a network trained before; pass --init with its weights")


def _shards(preset: Preset, typed: Mapping[str, Any]) -> int:
    """Return how many shards of the paper's size a batch has."""
    batch, size = typed.get("batch_size", preset["batch_size"]), preset.shard_size
    assert size is not None
    if batch % size:
        raise InputError(f"{preset.name} has {size} samples in a shard, which do not fit into a batch of {batch}")
    return batch // size
