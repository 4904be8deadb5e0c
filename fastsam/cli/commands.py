"""The commands `fastsam train` and `fastsam compare`."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich import box
from rich.console import Console
from rich.table import Table

from fastsam import __version__
from fastsam.cli import compare, processes, training
from fastsam.cli.config import Config, flag, flat, options_for, options_of, read_config, refuse_differences
from fastsam.cli.data import SCORED_ON
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, make_directory, read_checkpoint
from fastsam.cli.measuring import landscape_command, sharpness_command
from fastsam.cli.options import OPTIONS, CommandWithTables, Entry, Number, Several, shared_options, shown
from fastsam.cli.progress import Display, make_console
from fastsam.cli.report import caption, cells, headers, write_comparison, write_run
from fastsam.cli.results import Watcher
from fastsam.methods import METHODS

SCORED_ON_HELP = "held_out: train without a tenth of the training set and score on it, to choose settings fairly."

LOG_SHARPNESS_HELP = "Measure after every epoch how far the training loss rises along SAM's perturbation, rho 0.05."
SHARPNESS_HELP = "Measure the sharpness and the largest eigenvalue of every run, on up to 2048 training pictures."


def _out(default: str) -> Callable:
    return shown("--out", type=click.Path(path_type=Path), metavar="DIR", default=default, help="Made if need be.")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def fastsam(ctx: click.Context) -> None:
    """Sharpness-aware training, side by side with plain optimizers. (Not Segment Anything.)"""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


fastsam.add_command(sharpness_command)
fastsam.add_command(landscape_command)


@fastsam.command(cls=CommandWithTables)
@shown("--method", type=Entry("method", METHODS), metavar="NAME", default="sam")
@shared_options
@shown("--label-noise", type=Number(0, 1), metavar="X", default=0.0, help="Share of training labels redrawn.")
@shown("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", default=0)
@shown("--split-seed", type=click.IntRange(0, 2**32 - 1), metavar="N", help="Of the test split. Default: --seed.")
@shown("--scored-on", type=click.Choice(list(SCORED_ON)), default="test", help=SCORED_ON_HELP)
@click.option("--log-sharpness", is_flag=True, help=LOG_SHARPNESS_HELP)
@_out("runs/train")
@click.pass_context
def train(ctx: click.Context, out: Path, resume: bool, overwrite: bool, **options: Any) -> None:
    """Train one model. Writes history.csv, result.json, curve.png and a checkpoint after every epoch.

    `torchrun --nproc-per-node 2 -m fastsam train ...` trains with two processes, each on its part of every batch.
    """
    path, console = out / CHECKPOINT, make_console()
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
        # all have seen what was in the directory
        processes.wait()
        with Display(console, runs=1) if processes.is_first() else nullcontext(Watcher()) as watcher:
            result = training.train(config, out, resume=resume, watcher=watcher)
        if not processes.is_first():
            return
        write_run(out, result)
    scored = SCORED_ON[config.scored_on]
    console.print(f"{scored} accuracy: {result.last:.1f} % after the last epoch, {result.best:.1f} % after the best")
    console.print(f"wrote history.csv, result.json, curve.png and {CHECKPOINT} to {out}", soft_wrap=True)


@fastsam.command("compare", cls=CommandWithTables, short_help="Train several methods side by side.")
@shown("--methods", type=Several(Entry("method", METHODS)), metavar="NAME,...", default="sgd,sam")
@shown("--label-noise", type=Several(Number(0, 1)), metavar="X,...", default="0,0.4", help="Labels redrawn.")
@shown("--seeds", type=click.IntRange(1, 1000), metavar="N", default=3, help="Runs of each method.")
@click.option("--sharpness", is_flag=True, help=SHARPNESS_HELP)
@shared_options
@_out("runs/compare")
@click.pass_context
def compare_command(ctx: click.Context, out: Path, resume: bool, overwrite: bool, **options: Any) -> None:
    """Train several methods side by side, each with its rho chosen on held-out data unless --rho is given.

    Prints a table, and writes results.json, results.csv, comparison.png and table.md.
    """
    if processes.count() > 1:
        raise InputError("compare runs in one process; start it without torchrun, or train methods one by one")
    path, console = out / compare.PLAN, make_console()
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


def _config(**given: Any) -> Config:
    options = options_for(given["method"], {option: given.pop(option) for option in OPTIONS})
    if given["split_seed"] is None:
        given["split_seed"] = given["seed"]
    return Config(options=options, ranks=processes.count(), **given)


def _plan(**given: Any) -> compare.Plan:
    options = {option: value for option in OPTIONS if (value := given.pop(option)) is not None}
    for option in options:
        if not any(option in options_of(name) for name in given["methods"]):
            raise InputError(f"none of the methods ({', '.join(given['methods'])}) has {flag(option)}")
    plan = compare.Plan(options=options, **given)
    for method in plan.methods:
        # refuses now what the last method would refuse after hours
        plan.config(method, noise=0.0, seed=0)
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


def _print_table(console: Console, comparison: compare.Comparison) -> None:
    table = Table(box=box.SIMPLE_HEAD, caption=caption(comparison), caption_justify="left", pad_edge=False)
    for i, header in enumerate(headers(comparison.plan)):
        table.add_column(header, justify="left" if i < 3 else "right", no_wrap=True)
    noises = [row.label_noise for row in comparison.rows]
    for i, row in enumerate(comparison.rows):
        table.add_row(*cells(row, comparison.plan), end_section=noises[i + 1 : i + 2] != [row.label_noise])
    console.print(table)
