"""The commands `fastsam sharpness` and `fastsam landscape`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from fastsam.cli import flatness, surfaces
from fastsam.cli.errors import InputError
from fastsam.cli.files import environment, make_directory
from fastsam.cli.flatness import Trained
from fastsam.cli.options import THREADS_HELP, Device, Number, shown
from fastsam.cli.progress import Measuring, make_console
from fastsam.cli.tables import print_table

MODE_HELP = "Of batch norm: eval takes the running statistics, train those of each batch."


def _shared(command: Callable) -> Callable:
    """Add the options that both commands have, and the checkpoints."""
    options = [
        click.argument(
            "checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CHECKPOINT..."
        ),
        click.option("--samples", type=click.IntRange(1), metavar="N", help="Training pictures drawn. Default: all."),
        shown("--mode", type=click.Choice(["eval", "train"]), default="eval", help=MODE_HELP),
        shown("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", default=0, help="Of all that is drawn."),
        shown("--device", type=Device(["auto", "cpu", "cuda"]), default="auto", help="auto: a GPU if there is one."),
        shown("--threads", type=click.IntRange(1), metavar="N", default=1, help=THREADS_HELP),
    ]
    for add in reversed(options):
        command = add(command)
    return command


@click.command("sharpness", short_help="Measure how flat trained models are.")
@_shared
@shown("--rho", type=Number(0), metavar="X", default=0.05, help="Radius of the perturbation.")
@shown("--batch-size", type=click.IntRange(1), metavar="N", default=64, help="Pictures that share a perturbation: m.")
@shown("--eigenvalues", type=click.IntRange(0), metavar="K", default=5, help="Of the Hessian, the largest; 0: none.")
@shown("--tol", type=Number(0), metavar="X", default=1e-3, help="Relative accuracy of the eigenvalues.")
@click.option("--check", is_flag=True, help="Find the largest eigenvalue once more, by power iteration.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the numbers as JSON as well.")
def sharpness_command(
    checkpoints: tuple[Path, ...], samples: int | None, threads: int, device: str, out: Path | None, **how: Any
) -> None:
    """Measure how flat trained models are, on their training pictures, without crops, flips and label smoothing.

    CHECKPOINT is what `fastsam train` wrote, or its directory.
    """
    console = make_console()
    trained = _read(checkpoints, device, threads, samples, how["seed"])
    if out is not None:
        make_directory(out.absolute().parent)
    with Measuring(console) as shows:
        found = [flatness.measure(model, stage=shows.stage_of(model.label), **how) for model in trained]
    rows = [flatness.cells(model.label, row) for model, row in zip(trained, found, strict=True)]
    print_table(console, flatness.HEADERS, rows, below=flatness.caption(found[0]), wraps=range(1))
    if out is not None:
        flatness.write(out, trained, found)
        console.print(f"wrote {out}", soft_wrap=True)


@click.command("landscape", short_help="Draw the loss around trained models.")
@_shared
@shown("--dimensions", type=click.IntRange(1, 2), default=2, metavar="N", help="1: a line, 2: a surface.")
@shown("--points", type=click.IntRange(2), metavar="N", default=21, help="Along each direction.")
@shown("--extent", type=Number(0, min_open=True), metavar="X", default=1.0, help="Of each, in lengths of the filters.")
@shown("--pairs", type=click.IntRange(1), metavar="N", default=1, help="Random directions to average over.")
@click.option("--line", "is_line", is_flag=True, help="Draw the line from one checkpoint to another instead.")
@shown("--out", type=click.Path(path_type=Path), metavar="FILE", default="landscape.png", help="A PNG.")
def landscape_command(
    checkpoints: tuple[Path, ...],
    samples: int | None,
    threads: int,
    device: str,
    is_line: bool,
    out: Path,
    mode: str,
    seed: int,
    points: int,
    **plane: Any,
) -> None:
    """Draw the mean loss around trained models, as surfaces with contours, all on one scale.

    CHECKPOINT is what `fastsam train` wrote, or its directory. Directions are random, orthogonal and as long as each
    filter's weights (Li et al. 2018), from the same random numbers for every model. Points without a finite loss stay
    grey. The numbers go into a JSON file beside the picture.
    """
    if is_line and len(checkpoints) != 2:
        raise InputError(f"--line goes from one checkpoint to another, got {len(checkpoints)}; name two")
    console = make_console()
    trained = _read(checkpoints, device, threads, samples, seed)
    make_directory(out.absolute().parent)
    labels, how = [model.label for model in trained], {"mode": mode, "seed": seed, "points": points}
    title = f"{trained[0].about}: {len(trained[0].x)} training pictures"
    with Measuring(console) as shows:
        if is_line:
            found = [flatness.line_between(trained[0], trained[1], shows.stage, **how)]
            surfaces.write_line(out, (labels[0], labels[1]), found[0], title)
            labels = [" to ".join(labels)]
        else:
            how |= plane
            found = flatness.landscapes(trained, shows.stage, **how)
            surfaces.write_landscapes(out, labels, found, title)
    about = {"checkpoints": [str(model.path) for model in trained], **how, "environment": environment(device)}
    surfaces.write_numbers(out.with_suffix(".json"), labels, found, about)
    missing = sum(landscape.missing for landscape in found)
    gaps = f"; {missing} points have no finite loss" if missing else ""
    console.print(f"wrote {out} and {out.with_suffix('.json').name}{gaps}", soft_wrap=True)


def _read(paths: tuple[Path, ...], device: str, threads: int, samples: int | None, seed: int) -> list[Trained]:
    torch.set_num_threads(threads)
    return [Trained(path, device, samples, seed) for path in paths]
