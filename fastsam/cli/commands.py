"""The commands `fastsam train`, `fastsam compare`, `fastsam sweep` and `fastsam presets`."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from fastsam import __version__, presets
from fastsam.cli import compare, preset_options, processes, sweep, training
from fastsam.cli.config import Config, flag, flat, options_for, options_of, read_config, refuse_differences
from fastsam.cli.data import SCORED_ON
from fastsam.cli.errors import InputError
from fastsam.cli.files import CHECKPOINT, make_directory, read_checkpoint
from fastsam.cli.measuring import landscape_command, sharpness_command
from fastsam.cli.options import (
    OPTIONS,
    PRESET,
    PRESET_HELP,
    CommandWithTables,
    Entry,
    Number,
    Over,
    Several,
    When,
    shared_options,
    shown,
)
from fastsam.cli.progress import Display, make_console
from fastsam.cli.report import (
    caption,
    cells,
    headers,
    sweep_caption,
    sweep_cells,
    sweep_headers,
    write_comparison,
    write_run,
    write_sweep,
)
from fastsam.cli.results import Watcher
from fastsam.cli.tables import print_table
from fastsam.methods import METHODS

SCORED_ON_HELP = "held_out: train without a tenth of the training set and score on it, to choose settings fairly."

OVER_HELP = "An option and its values, as in rho=0.05,0.1; twice for every combination of two."
WHEN_HELP = (
    "Steps that perturb: last:0.3 or first:0.5, a share of the run, or every:5; the others are the plain optimizer's, "
    "with one pass. Default: all."
)
LOG_SHARPNESS_HELP = "Measure after every epoch how far the training loss rises along SAM's perturbation, rho 0.05."
SHARPNESS_HELP = "Measure the sharpness and the largest eigenvalue of every run, on up to 2048 training pictures."


_preset = click.option("--preset", type=PRESET, metavar="NAME", help=PRESET_HELP)
_seed = click.IntRange(0, 2**32 - 1)


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
@_preset
@shown("--method", type=Entry("method", METHODS), metavar="NAME", default="sam")
@shared_options
@shown("--label-noise", type=Number(0, 1), metavar="X", default=0.0, help="Share of training labels redrawn.")
@shown("--seed", type=_seed, metavar="N", default=0)
@shown("--split-seed", type=_seed, metavar="N", help="Of the test split. Default: --seed.")
@shown("--scored-on", type=click.Choice(list(SCORED_ON)), default="test", help=SCORED_ON_HELP)
@click.option("--when", type=When(), metavar="WORD:X", help=WHEN_HELP)
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
        config = _config(**_with_preset(ctx, options))
        if path.exists() and not overwrite:
            raise InputError(
                f"{out} already holds a run; add --resume to go on with it, --overwrite to start it afresh, "
                "or choose another --out"
            )
    make_directory(out)
    with _interruptible("train", out, path), processes.together(config.device):
        # all have seen what was in the directory
        processes.wait()
        if config.preset is not None and processes.is_first():
            _tell_of(console, config.preset, config.method)
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


@fastsam.command("sweep", cls=CommandWithTables, short_help="Train one method with several values of an option.")
@click.option("--over", type=Over(), multiple=True, metavar="NAME=X,...", help=OVER_HELP)
@_preset
@shown("--method", type=Entry("method", METHODS), metavar="NAME", default="sam")
@shared_options
@shown("--label-noise", type=Number(0, 1), metavar="X", default=0.0, help="Share of training labels redrawn.")
@shown("--seeds", type=click.IntRange(1, 1000), metavar="N", default=1, help="Runs of each point.")
@shown("--scored-on", type=click.Choice(list(SCORED_ON)), default="held_out", help=SCORED_ON_HELP)
@_out("runs/sweep")
@click.pass_context
def sweep_command(ctx: click.Context, out: Path, resume: bool, overwrite: bool, **options: Any) -> None:
    """Train one method with one or two options at several values each, scored on held-out data.

    Prints a table, and writes results.json, results.csv and table.md.
    """
    if processes.count() > 1:
        raise InputError("sweep runs in one process; start it without torchrun, or train values one by one")
    path, console = out / sweep.PLAN, make_console()
    over = _over(options.pop("over"))
    if _goes_on(resume, overwrite):
        plan = sweep.read_plan(out)
        refuse_differences(path, sweep.flat(plan), _given(ctx) | ({"over": over} if over else {}))
    elif not over:
        raise InputError("nothing is swept; name an option and its values, as in --over rho=0.05,0.1")
    else:
        plan = _sweep_plan(over, **_with_preset(ctx, options, over))
        sweep.prepare(plan, out, overwrite=overwrite)
    make_directory(out)
    with _interruptible("sweep", out, path):
        if plan.settings["preset"] is not None:
            _tell_of(console, plan.settings["preset"], plan.settings["method"])
        with Display(console, plan.runs()) as display:
            done = sweep.run(plan, out, display)
        write_sweep(out, done)
    rows = [sweep_cells(row) for row in done.rows]
    print_table(console, sweep_headers(plan), rows, below=sweep_caption(done), left=len(plan.over))
    console.print(f"wrote results.json, results.csv and table.md to {out}", soft_wrap=True)


@fastsam.command("presets", short_help="List the settings of the papers' tables.")
@click.argument("name", required=False, type=PRESET)
def presets_command(name: str | None) -> None:
    """List the presets, or show what one sets, where each value stands, and what its paper does not give."""
    console = make_console()
    if name is None:
        for known in presets.names():
            console.print(known)
        return
    preset = presets.load(name)
    rows = [[key, sweep.shown(value.value), value.source] for key, value in preset.values.items()]
    rows += [[key, "-", f"not given{f'; {hint}' if hint else ''}"] for key, hint in preset.gaps.items()]
    print_table(console, ["setting", "value", "where it stands"], rows, left=3, wraps=range(3))
    _tell_of(console, name, preset.method)


def _over(given: tuple[tuple[str, list[Any]], ...]) -> dict[str, list[Any]]:
    """Return the values of each swept option, of which there are two at most."""
    names = [name for name, _ in given]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{repeated[0]} is there twice in --over; list all its values in one")
    if len(names) > 2:
        raise InputError(f"--over takes one or two options, got {len(names)}; fix one of {', '.join(names)}")
    return dict(given)


def _sweep_plan(over: dict[str, list[Any]], seeds: int, **given: Any) -> sweep.SweepPlan:
    options = {option: value for option in OPTIONS if (value := given.pop(option)) is not None}
    plan = sweep.SweepPlan(over, seeds, options, given)
    for point in plan.points():
        # refuses now what the last point would refuse after hours
        plan.config(point, seed=0)
    # an option that no point has is a mistake
    known = {name for point in plan.points() for name in plan.config(point, seed=0).options}
    if unknown := [option for option in options if option not in known]:
        raise InputError(f"{given['method']} has no {flag(unknown[0])}; it has {', '.join(map(flag, sorted(known)))}")
    return plan


def _with_preset(
    ctx: click.Context, options: dict[str, Any], over: Mapping[str, list[Any]] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the options with what the preset sets in place of those that were not typed."""
    typed = _given(ctx)
    if both := [name for name in over if name in typed]:
        raise InputError(f"{flag(both[0])} is swept with --over; leave it out beside that")
    if options["preset"] is None:
        return options
    return options | preset_options.settings_of(presets.load(options["preset"]), typed, over)


def _tell_of(console: Console, preset: str, method: str) -> None:
    for line in preset_options.about(presets.load(preset), method):
        console.print(line)


def _config(**given: Any) -> Config:
    options = options_for(given["method"], {option: given.pop(option) for option in OPTIONS}, given["base"])
    if given["split_seed"] is None:
        given["split_seed"] = given["seed"]
    given["base"] = given["base"] or ""
    return Config(options=options, ranks=processes.count(), **given)


def _plan(**given: Any) -> compare.Plan:
    options = {option: value for option in OPTIONS if (value := given.pop(option)) is not None}
    plan = compare.Plan(options=options, **given)
    for option in options:
        if not any(option in options_of(name, plan.base_of(name)) for name in plan.methods):
            raise InputError(f"none of the methods ({', '.join(plan.methods)}) has {flag(option)}")
    if plan.base is not None and all(METHODS[name].kind == "base" for name in plan.methods):
        raise InputError(f"none of the methods ({', '.join(plan.methods)}) goes around a base; leave --base out")
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
    noises = [row.label_noise for row in comparison.rows]
    ends = [noises[i + 1 : i + 2] != [noise] for i, noise in enumerate(noises)]
    rows = [cells(row, comparison.plan) for row in comparison.rows]
    print_table(console, headers(comparison.plan), rows, below=caption(comparison), left=3, ends=ends)
