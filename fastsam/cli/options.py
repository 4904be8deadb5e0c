"""The options of the commands: made from the tables of methods, data and models, checked before anything is read."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from fastsam import presets
from fastsam.cli import initial
from fastsam.cli.config import AMP, BASES, SCHEDULES, flag, options_of, when_of
from fastsam.cli.data import DATA_SETS, resolve, spelling
from fastsam.cli.errors import InputError
from fastsam.cli.models import MODELS, check_model
from fastsam.cli.sweep import SWEPT_FIELDS
from fastsam.methods import METHODS

OPTIONS = list(dict.fromkeys(option for name in METHODS for option in options_of(name)))
CHOICES = {option: words for method in METHODS.values() for option, words in method.choices.items()}
DATA_HELP = "See below. CIFAR's pictures are cropped and flipped at random and stay bytes on the device."
AMP_HELP = "Mixed precision; fp16, with a GradScaler, is for GPUs: convolutions in it crawl on a CPU."
THREADS_HELP = "Of the CPU. The digits gain little from a second one, and crawl where it has to wait for others."
CHANNELS_LAST_HELP = "Weights and pictures with the channels innermost, as a GPU's convolutions in 16 bits like them."
COMPILE_HELP = (
    "torch.compile the model: the first steps, and those after --resume, take up to minutes. Not for --mask tensor, "
    "which would recompile in each step. A GPU may pick other kernels the next time, and the run then not repeat."
)
BASE_HELP = "The optimizer that methods go around. Default: sgd."
SCHEDULE_HELP = "How the rate falls, by steps: to 0 as a cosine, or as torch's one cycle, the momentum constant."
WARMUP_HELP = "Epochs in which the rate rises. Default: 0, for onecycle 0.3 of --epochs."
INIT_HELP = "Begin with the weights of a checkpoint of train, of its directory, or of a state dict."
FREEZE_BN_HELP = "Keep batch norm's statistics as they are in --init; its weights and biases train."
PRESET_HELP = "Settings of a paper's table, those typed beside it in their place; fastsam presets lists them."
GRAPH_HELP = "Take whole steps as CUDA graphs, bit for bit the same. On a CPU it changes nothing."


class Entry(click.ParamType):
    """A key of a table."""

    def __init__(self, kind: str, table: Mapping[str, Any]) -> None:
        self.name, self.table = kind, table

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the key, or fail with a list of those there are."""
        if value not in self.table:
            self.fail(f"unknown {self.name} {value!r}; known are {', '.join(self.table)}", param, ctx)
        return value


class Checked(click.ParamType):
    """A text that a function checks, and returns as it is to be kept.

    Args:
        name: what it is.
        check: returns the text, or raises InputError or ValueError.
    """

    def __init__(self, name: str, check: Callable[[str], str]) -> None:
        self.name, self.check = name, check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text as it is kept, or fail before anything is read."""
        try:
            return self.check(value)
        except (InputError, ValueError) as error:
            self.fail(str(error), param, ctx)


DATA = Checked("data set", resolve)
MODEL = Checked("model", check_model)
WEIGHTS = Checked("weights", lambda path: str(initial.find(Path(path).expanduser())))
PRESET = Checked("preset", lambda name: presets.load(name).name)


class Number(click.FloatRange):
    """A number that is neither nan nor infinite."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Several(click.ParamType):
    """A list with commas between its items, each of which occurs once."""

    def __init__(self, item: click.ParamType) -> None:
        self.item, self.name = item, f"{item.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """Return the items, or fail at the first bad one."""
        items = [self.item.convert(text.strip(), param, ctx) for text in str(value).split(",")]
        if repeated := [item for item in items if items.count(item) > 1]:
            self.fail(f"{repeated[0]} is there twice", param, ctx)
        return items


class Over(click.ParamType):
    """An option of the same command, an equals sign, and values of it with commas between."""

    name = "option=values"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, list[Any]]:
        """Return the option's name and its values, or fail at the first bad one."""
        spelled, equals, values = str(value).partition("=")
        name = spelled.strip().removeprefix("--").replace("-", "_")
        if not equals:
            self.fail(f"{value!r} is not NAME=X,... as in rho=0.05,0.1", param, ctx)
        assert ctx is not None
        known = {p.name: p for p in ctx.command.params if p.name in (*OPTIONS, *SWEPT_FIELDS)}
        if name not in known:
            self.fail(f"{spelled!r} cannot be swept; what can is {', '.join(map(flag, known))}", param, ctx)
        return name, Several(known[name].type).convert(values, known[name], ctx)


class When(click.ParamType):
    """Which steps perturb, in words; how many steps the run has is not known yet."""

    name = "schedule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text, or fail before anything is read."""
        try:
            when_of(value, total_steps=10**12)
        except InputError as error:
            self.fail(str(error), param, ctx)
        return value


class Device(click.Choice):
    """Where to train; "auto" stands for a GPU if there is one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return "cpu" or "cuda", or fail if it is not there."""
        name, there = super().convert(value, param, ctx), torch.cuda.is_available()
        if name == "cuda" and not there:
            self.fail("this machine has no CUDA device that torch can use; take cpu or auto", param, ctx)
        return ("cuda" if there else "cpu") if name == "auto" else name


class CommandWithTables(click.Command):
    """A command whose help ends with the tables."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each table, as it is now."""
        data_sets = {spelling(name): entry for name, entry in DATA_SETS.items()}
        for title, table in {"Methods": METHODS, "Data sets": data_sets, "Models": MODELS}.items():
            rows = [(name, entry.summary) for name, entry in table.items()]  # type: ignore[attr-defined]
            if table is MODELS:
                rows.append(("timm:NAME", "a model of timm's, where that is installed"))
            with formatter.section(title):
                formatter.write_dl(rows)


def shared_options(command: Callable) -> Callable:
    """Add the options that all commands that train have."""
    positive, share = click.IntRange(min=1), Number(0, 1)
    of_methods = [
        click.option(
            flag(option),
            type=_type(option),
            metavar={click.Choice: None, click.IntRange: "N"}.get(type(_type(option)), "X"),
            help=f"Default: {_defaults(option)}.",
        )
        for option in OPTIONS
    ]
    options = [
        shown("--data", type=DATA, metavar="NAME[:...]", default="digits", help=DATA_HELP),
        shown("--model", type=MODEL, metavar="NAME", default="cnn"),
        shown("--epochs", type=positive, metavar="N", default=30),
        shown("--batch-size", type=positive, metavar="N", default=64),
        click.option("--base", type=click.Choice(BASES), help=BASE_HELP),
        *of_methods,
        shown("--schedule", type=click.Choice(SCHEDULES), default="cosine", help=SCHEDULE_HELP),
        click.option("--warmup", type=Number(min=0), metavar="X", help=WARMUP_HELP),
        click.option("--clip", type=Number(min=0, min_open=True), metavar="X", help="Largest norm of the gradient."),
        click.option("--init", type=WEIGHTS, metavar="CKPT", help=INIT_HELP),
        click.option("--freeze-bn", is_flag=True, help=FREEZE_BN_HELP),
        shown("--label-smoothing", type=share, metavar="X", default=0.0),
        shown("--amp", type=click.Choice(list(AMP)), default="off", help=AMP_HELP),
        click.option("--channels-last", is_flag=True, help=CHANNELS_LAST_HELP),
        click.option("--compile", is_flag=True, help=COMPILE_HELP),
        click.option("--graph", is_flag=True, help=GRAPH_HELP),
        shown("--device", type=Device(["auto", "cpu", "cuda"]), default="auto", help="auto: a GPU if there is one."),
        shown("--threads", type=positive, metavar="N", default=1, help=THREADS_HELP),
        click.option("--resume", is_flag=True, help="Go on where --out was interrupted, with its settings."),
        click.option("--overwrite", is_flag=True, help="Start afresh in an --out that holds earlier results."),
    ]
    for add in reversed(options):
        command = add(command)
    return command


def shown(name: str, **keywords: Any) -> Callable:
    """Return an option whose help shows its default."""
    return click.option(name, show_default=True, **keywords)


def _type(option: str) -> click.ParamType:
    if option in CHOICES:
        return click.Choice(CHOICES[option])
    whole = any(isinstance(options_of(name).get(option), int) for name in METHODS)
    return click.IntRange(min=0) if whole else Number(min=0)


def _defaults(option: str) -> str:
    """Return the default of every row that has the option itself: those around a base have the base's too."""
    return ", ".join(f"{name} {row.options[option]}" for name, row in METHODS.items() if option in row.options)
