"""The commands `fastsam train` and `fastsam compare`, which offer what the tables of methods, data and models hold."""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.table import Table

from fastsam import __version__
from fastsam.cli import compare, processes, training
from fastsam.cli.config import (
    AMP,
    CHECKPOINT,
    Config,
    flag,
    flat,
    options_for,
    options_of,
    read_checkpoint,
    read_config,
    refuse_differences,
)
from fastsam.cli.data import DATA_SETS, SCORED_ON, resolve, spelling
from fastsam.cli.errors import InputError
from fastsam.cli.models import MODELS
from fastsam.cli.progress import Display
from fastsam.cli.report import SCORED, caption, cells, headers, make_directory, write_comparison, write_run
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
GRAPH_HELP = "Take whole steps as CUDA graphs, bit for bit the same. On a CPU it changes nothing."
SCORED_ON_HELP = "held_out: train without a tenth of the training set and score on it, to choose settings fairly."


class Entry(click.ParamType):
    """A key of a table."""

    def __init__(self, kind: str, table: Mapping[str, Any]) -> None:
        self.name, self.table = kind, table

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the key, or fail with a list of those there are."""
        if value not in self.table:
            self.fail(f"unknown {self.name} {value!r}; known are {', '.join(self.table)}", param, ctx)
        return value


class Data(click.ParamType):
    """A data set that is there, by its name and what follows the colon."""

    name = "data set"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the data set in full, or fail before anything is read."""
        try:
            return resolve(value)
        except InputError as error:
            self.fail(str(error), param, ctx)


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
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in table.items()])  # type: ignore[attr-defined]


def shared_options(command: Callable) -> Callable:
    """Add the options that both commands have."""
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
        _option("--data", type=Data(), metavar="NAME[:...]", default="digits", help=DATA_HELP),
        _option("--model", type=Entry("model", MODELS), metavar="NAME", default="cnn"),
        _option("--epochs", type=positive, metavar="N", default=30, help="The rate falls to 0 as a cosine, by steps."),
        _option("--batch-size", type=positive, metavar="N", default=64),
        *of_methods,
        _option("--label-smoothing", type=share, metavar="X", default=0.0),
        _option("--amp", type=click.Choice(list(AMP)), default="off", help=AMP_HELP),
        click.option("--channels-last", is_flag=True, help=CHANNELS_LAST_HELP),
        click.option("--compile", is_flag=True, help=COMPILE_HELP),
        click.option("--graph", is_flag=True, help=GRAPH_HELP),
        _option("--device", type=Device(["auto", "cpu", "cuda"]), default="auto", help="auto: a GPU if there is one."),
        _option("--threads", type=positive, metavar="N", default=1, help=THREADS_HELP),
        click.option("--resume", is_flag=True, help="Go on where --out was interrupted, with its settings."),
        click.option("--overwrite", is_flag=True, help="Start afresh in an --out that holds earlier results."),
    ]
    for add in reversed(options):
        command = add(command)
    return command


def _option(name: str, **keywords: Any) -> Callable:
    return click.option(name, show_default=True, **keywords)


def _type(option: str) -> click.ParamType:
    if option in CHOICES:
        return click.Choice(CHOICES[option])
    whole = any(isinstance(options_of(name).get(option), int) for name in METHODS)
    return click.IntRange(min=0) if whole else Number(min=0)


def _defaults(option: str) -> str:
    return ", ".join(f"{name} {options_of(name)[option]}" for name in METHODS if option in options_of(name))


def _out(default: str) -> Callable:
    return _option("--out", type=click.Path(path_type=Path), metavar="DIR", default=default, help="Made if need be.")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def fastsam(ctx: click.Context) -> None:
    """Sharpness-aware training, side by side with plain optimizers. (Not Segment Anything.)"""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@fastsam.command(cls=CommandWithTables)
@_option("--method", type=Entry("method", METHODS), metavar="NAME", default="sam")
@shared_options
@_option("--label-noise", type=Number(0, 1), metavar="X", default=0.0, help="Share of training labels redrawn.")
@_option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", default=0)
@_option("--split-seed", type=click.IntRange(0, 2**32 - 1), metavar="N", help="Of the test split. Default: --seed.")
@_option("--scored-on", type=click.Choice(SCORED_ON), default="test", help=SCORED_ON_HELP)
@_out("runs/train")
@click.pass_context
def train(ctx: click.Context, out: Path, resume: bool, overwrite: bool, **options: Any) -> None:
    """Train one model. Writes history.csv, result.json, curve.png and a checkpoint after every epoch.

    `torchrun --nproc-per-node 2 -m fastsam train ...` trains with two processes, each on its part of every batch.
    """
    path, console = out / CHECKPOINT, _console()
    if _goes_on(resume, overwrite):
        config = read_config(read_checkpoint(path), path)
        refuse_differences(path, flat(config), _given(ctx) | {"ranks": processes.count()})
    else:
        config = _config(**options)
        if path.exists() and not overwrite:
            raise InputError(
                f"{out} already holds a run; add --resume to go on with it, --overwrite to start it afresh, "
                "or choose another --out"
            )
    make_directory(out)
    with _interruptible("train", out, path), processes.together(config.device):
        processes.wait()  # all have seen what was in the directory
        with Display(console, runs=1) if processes.is_first() else nullcontext(training.Watcher()) as watcher:
            result = training.train(config, out, resume=resume, watcher=watcher)
        if not processes.is_first():
            return
        write_run(out, result)
    scored = SCORED[config.scored_on]
    console.print(f"{scored} accuracy: {result.last:.1f} % after the last epoch, {result.best:.1f} % after the best")
    console.print(f"wrote history.csv, result.json, curve.png and {CHECKPOINT} to {out}", soft_wrap=True)


@fastsam.command("compare", cls=CommandWithTables, short_help="Train several methods side by side.")
@_option("--methods", type=Several(Entry("method", METHODS)), metavar="NAME,...", default="sgd,sam")
@_option("--label-noise", type=Several(Number(0, 1)), metavar="X,...", default="0,0.4", help="Labels redrawn.")
@_option("--seeds", type=click.IntRange(1, 1000), metavar="N", default=3, help="Runs of each method.")
@shared_options
@_out("runs/compare")
@click.pass_context
def compare_command(ctx: click.Context, out: Path, resume: bool, overwrite: bool, **options: Any) -> None:
    """Train several methods side by side, each with its rho chosen on held-out data unless --rho is given.

    Prints a table, and writes results.json, results.csv, comparison.png and table.md.
    """
    if processes.count() > 1:
        raise InputError("compare runs in one process; start it without torchrun, or train methods one by one")
    path, console = out / compare.PLAN, _console()
    if _goes_on(resume, overwrite):
        plan = compare.read_plan(out)
        refuse_differences(path, compare.flat(plan), _given(ctx))
    else:
        plan = _plan(**options)
        compare.prepare(plan, out, overwrite=overwrite)
    make_directory(out)
    with _interruptible("compare", out, path):
        with Display(console, plan.runs()) as display:
            comparison = compare.run(plan, out, display)
        write_comparison(out, comparison)
    _print_table(console, comparison)
    console.print(f"wrote results.json, results.csv, comparison.png and table.md to {out}", soft_wrap=True)


def _config(**options: Any) -> Config:
    knobs = options_for(options["method"], {option: options.pop(option) for option in OPTIONS})
    if options["split_seed"] is None:
        options["split_seed"] = options["seed"]
    return Config(knobs=knobs, ranks=processes.count(), **options)


def _plan(**options: Any) -> compare.Plan:
    knobs = {option: value for option in OPTIONS if (value := options.pop(option)) is not None}
    for option in knobs:
        if not any(option in options_of(name) for name in options["methods"]):
            raise InputError(f"none of the methods ({', '.join(options['methods'])}) has {flag(option)}")
    plan = compare.Plan(knobs=knobs, **options)
    for method in plan.methods:
        plan.config(method, noise=0.0, seed=0)  # refuses now what the last method would refuse after hours
    return plan


def _goes_on(resume: bool, overwrite: bool) -> bool:
    if resume and overwrite:
        raise InputError("--resume goes on and --overwrite starts afresh; choose one of them")
    return resume


def _given(ctx: click.Context) -> dict[str, Any]:
    """Return the settings that were typed, as opposed to those that are defaults."""
    typed = {k: v for k, v in ctx.params.items() if ctx.get_parameter_source(k) is ParameterSource.COMMANDLINE}
    return {key: value for key, value in typed.items() if key not in ("out", "resume", "overwrite")}


@contextmanager
def _interruptible(command: str, out: Path, marker: Path) -> Iterator[None]:
    """Turn Ctrl-C into exit code 130 and the line that goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        go_on = shlex.join(["fastsam", command, "--out", str(out), "--resume"])
        message = f"interrupted; go on with: {go_on}" if marker.exists() else "interrupted before anything was written"
        click.echo(f"fastsam: {message}", err=True)
        raise click.exceptions.Exit(130) from None


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 100))


def _print_table(console: Console, comparison: compare.Comparison) -> None:
    table = Table(box=box.SIMPLE_HEAD, caption=caption(comparison), caption_justify="left", pad_edge=False)
    for header in headers:
        table.add_column(header, justify="left" if header in headers[:3] else "right", no_wrap=True)
    noises = [row.label_noise for row in comparison.rows]
    for i, row in enumerate(comparison.rows):
        table.add_row(*cells(row, comparison.plan.seeds), end_section=noises[i + 1 : i + 2] != [row.label_noise])
    console.print(table)
