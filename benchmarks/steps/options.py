"""Options of the benchmarks of whole steps."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness
from benchmarks.arms.tasks import TASKS

REGIMES = ("eager", "compiled", "graph")


@dataclass
class Options:
    """What is timed, where and how often.

    Args:
        models, methods, regimes: keys of `TASKS`, of the arms, and of `REGIMES`.
        rows: batch size; None for the model's own on the device.
        rounds: samples of each arm.
        steps: in a sample; None for 50 on a GPU and 3 on the CPU.
        counted: steps whose launches and passes are counted.
        device: "cpu" or "cuda".
        amp: autocast, "off", "bf16" or "fp16" with a loss scale.
        channels_last: memory format of convolutional nets, "on", "off", or "auto" for on where there is a GPU.
        compiler: backend of torch.compile in the compiled regime.
        together: captured arms side by side, besides the bases.
    """

    models: list[str]
    methods: list[str]
    regimes: list[str]
    rows: int | None = None
    rounds: int = 7
    steps: int | None = None
    counted: int = 10
    device: str = "cpu"
    amp: str = "off"
    channels_last: str = "auto"
    compiler: str = "inductor"
    together: int = 1

    def __post_init__(self) -> None:
        if self.steps is None:
            self.steps = 50 if self.device == "cuda" else 3


def step_options(
    models: str, methods: Mapping[str, Any], default: Iterable[str], rows: int | None = None, steps: int | None = None
) -> Callable:
    """Return a decorator for a command that is then called with `Options`, and with the file for its results or None.

    Args:
        models: the default of `--models`.
        methods: what `--methods` chooses from.
        default: those that run without `--methods`.
        rows: the default of `--rows`.
        steps: the default of `--steps`.
    """
    at_least_1 = click.IntRange(min=1)
    options = [
        harness.names("--models", "model", TASKS, models.split(",")),
        harness.names("--methods", "method", methods, default, "The bases always run."),
        harness.names("--regimes", "regime", dict.fromkeys(REGIMES), ["eager"]),
        click.option("--rows", type=at_least_1, default=rows, help="Batch size; default: the model's own."),
        harness.rounds_option(7),
        click.option(
            "--steps", type=at_least_1, default=steps, help="In a sample; default: 50 on a GPU, 3 on the CPU."
        ),
        click.option(
            "--counted", type=click.IntRange(min=0), default=10, show_default=True,
            help="Steps whose launches and passes are counted; random masks vary them.",
        ),
        click.option(
            "--device", type=click.Choice(["cpu", "cuda"]),
            default=lambda: "cuda" if torch.cuda.is_available() else "cpu", help="Default: a GPU where there is one.",
        ),
        click.option(
            "--amp", type=click.Choice(["off", "bf16", "fp16"]), default="off", show_default=True,
            help="Autocast; fp16 scales its loss.",
        ),
        click.option(
            "--channels-last", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
            help="Memory format of convolutional nets; auto: on a GPU.",
        ),
        click.option(
            "--compiler", default="inductor", show_default=True, help="Backend of torch.compile in the compiled regime."
        ),
        click.option(
            "--together", type=at_least_1, default=1, show_default=True,
            help="Captured arms side by side, besides the bases.",
        ),
        harness.out_option("JSON file for the results; a plot goes beside it."),
    ]  # fmt: skip

    def decorate(command: Callable[[Options, Path | None], None]) -> Callable:
        @wraps(command)
        def decorated(out: Path | None, **given: Any) -> None:
            command(Options(**given), out)

        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
