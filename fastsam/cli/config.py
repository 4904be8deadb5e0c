"""What decides a training run's numbers, and what of it a checkpoint says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastsam.cli.errors import InputError
from fastsam.cli.files import contents_of
from fastsam.methods import METHODS

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers. Names are keys of METHODS, DATA_SETS, MODELS and AMP.

    `options` are all of the method, those of its base among them; `data` is what `fastsam.cli.data.resolve` returns;
    `batch_size` is that of all `ranks` together.

    Raises:
        InputError: the method cannot be compiled, or the ranks' parts of a batch would not be equal.
    """

    method: str
    options: dict[str, Any]
    data: str = "digits"
    model: str = "cnn"
    epochs: int = 30
    batch_size: int = 64
    label_smoothing: float = 0.0
    label_noise: float = 0.0
    seed: int = 0
    split_seed: int = 0
    scored_on: str = "test"
    amp: str = "off"
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    device: str = "cpu"
    threads: int = 1
    ranks: int = 1
    log_sharpness: bool = False

    def __post_init__(self) -> None:
        if self.batch_size % self.ranks:
            raise InputError(f"batch size {self.batch_size} cannot be cut into equal parts for {self.ranks} processes")
        if self.graph and self.ranks > 1:
            raise InputError("--graph captures steps of one process; leave it out, or start without torchrun")
        if self.compile and self.options.get("mask") == "tensor" and self.options["beta"] < 1:
            raise InputError(
                f"{self.method} with --mask tensor cannot be compiled: it leaves other gradients out in each step, and "
                "the model would be compiled anew for each; take --mask element, or leave --compile out"
            )


def options_of(name: str) -> dict[str, Any]:
    """Return all options of a method with their defaults: first those of its base, then its own."""
    method = METHODS[name]
    return {**(METHODS[method.base].options if method.base else {}), **method.options}


def options_for(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a method: those given, and the defaults for those that are None or absent.

    Args:
        name: a key of METHODS.
        given: values by option.

    Raises:
        InputError: a given option is none of the method's.
    """
    options = options_of(name)
    chosen = {option: value for option, value in given.items() if value is not None}
    if unknown := [option for option in chosen if option not in options]:
        raise InputError(f"{name} has no {flag(unknown[0])}; it has {', '.join(map(flag, options))}")
    return {**options, **chosen}


def flag(option: str) -> str:
    """Return an option's name on the command line."""
    return "--" + option.replace("_", "-")


def flat(config: Config) -> dict[str, Any]:
    """Return the config's fields with the method's options among them."""
    return {key: value for key, value in asdict(config).items() if key != "options"} | config.options


def read_config(checkpoint: dict[str, Any], path: Path) -> Config:
    """Return a checkpoint's config.

    Args:
        checkpoint: what `read_checkpoint` returned.
        path: where it was read, for the message.

    Raises:
        InputError: another version of fastsam wrote it, or somebody altered it.
    """
    with contents_of(path):
        saved = {"log_sharpness": False, **with_options(checkpoint["config"])}
        if set(saved) != {field.name for field in fields(Config)}:
            raise InputError(f"{path} was written by another version of fastsam; resume it with that one")
        return Config(**saved)


def with_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config or a plan as it was saved, with its options under the name that they have had since."""
    return {"options" if key == "knobs" else key: value for key, value in saved.items()}


def refuse_differences(path: Path, started_with: dict[str, Any], asked_for: dict[str, Any]) -> None:
    """Refuse to go on with other settings than those that a run began with.

    Args:
        path: the checkpoint or plan, for the message.
        started_with: its settings.
        asked_for: settings, some or all.

    Raises:
        InputError: names every entry of `asked_for` that is another in `started_with`.
    """
    different = [
        f"{key.replace('_', '-')} {value} (it has {started_with.get(key)})"
        for key, value in asked_for.items()
        if key not in started_with or started_with[key] != value
    ]
    if different:
        raise InputError(f"{path} cannot be resumed with {', '.join(different)}; use its own, or another --out")
