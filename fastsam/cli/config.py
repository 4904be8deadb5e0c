"""What decides a training run's numbers, and what of it a checkpoint says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastsam.cli.errors import InputError
from fastsam.cli.files import contents_of
from fastsam.methods import METHODS
from fastsam.schedule import Every, First, Last, Schedule

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("cosine", "onecycle")
BASES = [name for name, method in METHODS.items() if method.kind == "base"]
WARMUP_OF_ONECYCLE = 0.3
"""Share of the epochs over which the rate rises unless told otherwise, torch's own."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers. Names are keys of METHODS, DATA_SETS, MODELS and AMP.

    `options` are all of the method, those of its base among them; `data` is what `fastsam.cli.data.resolve` returns;
    `batch_size` is that of all `ranks` together; `base` is the optimizer that the method goes around, by default its
    row's; `warmup` is in epochs, by default 0, and `WARMUP_OF_ONECYCLE` of them with that schedule; `init` is the file
    that the first weights come from; `when` is what `when_of` reads, None for all steps. `preset` says where settings
    came from, and decides nothing.

    Raises:
        InputError: the method cannot be compiled, has no such base or perturbs nothing in any step, the ranks' parts of
            a batch would not be equal, the rate would never fall, or there are no statistics to freeze.
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
    base: str = ""
    schedule: str = "cosine"
    warmup: float | None = None
    clip: float | None = None
    init: str | None = None
    freeze_bn: bool = False
    preset: str | None = None
    when: str | None = None

    def __post_init__(self) -> None:
        # what is left to the method and the schedule is written down as what it is
        object.__setattr__(self, "base", base_of(self.method, self.base))
        if self.warmup is None:
            warmup = WARMUP_OF_ONECYCLE * self.epochs if self.schedule == "onecycle" else 0.0
            object.__setattr__(self, "warmup", warmup)
        if self.rises_for >= self.epochs:
            raise InputError(f"--warmup {self.warmup:g} leaves no epoch of {self.epochs} for the rate to fall in")
        if self.freeze_bn and self.init is None:
            raise InputError("--freeze-bn keeps the statistics of --init; name a checkpoint with it")
        if self.batch_size % self.ranks:
            raise InputError(f"batch size {self.batch_size} cannot be cut into equal parts for {self.ranks} processes")
        if self.graph and self.ranks > 1:
            raise InputError("--graph captures steps of one process; leave it out, or start without torchrun")
        if self.when is not None and METHODS[self.method].kind != "optimizer":
            known = ", ".join(name for name, method in METHODS.items() if method.kind == "optimizer")
            raise InputError(f"--when says which steps perturb, and {self.method} perturbs in none; {known} do")
        if self.compile and self.options.get("mask") == "tensor" and self.options["beta"] < 1:
            raise InputError(
                f"{self.method} with --mask tensor cannot be compiled: it leaves other gradients out in each step, and "
                "the model would be compiled anew for each; take --mask element, or leave --compile out"
            )

    @property
    def label(self) -> str:
        """The method, its base where that is not the row's, and the value of what is tuned of it."""
        around = f" around {self.base}" if self.base != base_of(self.method) else ""
        tuned = METHODS[self.method].tuned
        chosen = f" {tuned} {self.options[tuned]:g}" if tuned else ""
        return self.method + around + chosen + (f" {self.when}" if self.when else "")

    @property
    def rises_for(self) -> float:
        """Epochs over which the rate rises."""
        return self.warmup or 0.0


def when_of(when: str | None, total_steps: int) -> Schedule | None:
    """Return the schedule that a text stands for: every:N, last:X or first:X, X a share of the run.

    Args:
        when: the text; None for all steps.
        total_steps: of the run.

    Raises:
        InputError: it is no such text, or the number is out of range.
    """
    if when is None:
        return None
    kind, _, number = when.partition(":")
    try:
        value = int(number) if kind == "every" else float(number)
    except ValueError:
        kind, value = "", 0
    if kind not in ("every", "last", "first"):
        raise InputError(f"--when {when} is none of every:N, last:X and first:X, such as last:0.3")
    try:
        if kind == "every":
            return Every(int(value))
        return (Last if kind == "last" else First)(value, total_steps)
    except ValueError as error:
        raise InputError(f"--when {when}: {error}") from error


def base_of(name: str, base: str | None = None) -> str:
    """Return the base of a method, a key of METHODS: the one asked for, or its row's, or itself.

    Args:
        name: a key of METHODS.
        base: "sgd" or "adamw"; None or empty for the row's.

    Raises:
        InputError: the method is a base itself, and not that one.
    """
    own = METHODS[name].base or name
    if base and base != own and METHODS[name].kind == "base":
        raise InputError(f"{name} is a base itself and goes around none; take --method {base}, or leave --base out")
    return base or own


def options_of(name: str, base: str | None = None) -> dict[str, Any]:
    """Return all options of a method with their defaults: first those of its base, then its own.

    Args:
        name: a key of METHODS.
        base: what `base_of` takes.
    """
    return {**METHODS[base_of(name, base)].options, **METHODS[name].options}


def options_for(name: str, given: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """Return all options of a method: those given, and the defaults for those that are None or absent.

    Args:
        name: a key of METHODS.
        given: values by option.
        base: what `base_of` takes.

    Raises:
        InputError: a given option is none of the method's.
    """
    options = options_of(name, base)
    chosen = {option: value for option, value in given.items() if value is not None}
    if unknown := [option for option in chosen if option not in options]:
        around = f" around {base}" if base and base != METHODS[name].base else ""
        raise InputError(f"{name}{around} has no {flag(unknown[0])}; it has {', '.join(map(flag, options))}")
    return {**options, **chosen}


def flag(option: str) -> str:
    """Return an option's name on the command line."""
    return "--" + option.replace("_", "-")


def flat(config: Config) -> dict[str, Any]:
    """Return the config's fields with the method's options among them."""
    return {key: value for key, value in asdict(config).items() if key != "options"} | config.options


SINCE: Mapping[str, Any] = {
    field.name: field.default
    for field in fields(Config)
    if field.name in ("log_sharpness", "base", "schedule", "warmup", "clip", "init", "freeze_bn", "preset", "when")
}
"""Fields that checkpoints from before they came do not have, with what those runs did."""


def read_config(checkpoint: dict[str, Any], path: Path) -> Config:
    """Return a checkpoint's config.

    Args:
        checkpoint: what `read_checkpoint` returned.
        path: where it was read, for the message.

    Raises:
        InputError: another version of fastsam wrote it, or somebody altered it.
    """
    with contents_of(path):
        saved = {**SINCE, **with_options(checkpoint["config"])}
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
