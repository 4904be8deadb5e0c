"""The files that runs and comparisons leave behind, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsam.cli.compare import FLATNESS_SAMPLES, Comparison, Plan, Row
from fastsam.cli.config import Config
from fastsam.cli.data import SCORED_ON, short
from fastsam.cli.files import environment, replacing, write_json, write_text
from fastsam.cli.results import Result
from fastsam.cli.sweep import Sweep, SweepPlan, SweepRow, shown, words
from fastsam.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUN_COLUMNS = (
    "label_noise",
    "method",
    "tuned",
    "value",
    "seed",
    "last_accuracy",
    "best_accuracy",
    "step_ms",
    "seconds",
)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


# one run


def write_run(out: Path, result: Result) -> None:
    """Write history.csv, result.json and curve.png.

    Args:
        out: an existing directory.
        result: a finished run.

    Raises:
        InputError: a file cannot be written.
    """
    scored = result.config.scored_on
    columns = {"accuracy": f"{scored}_accuracy"}
    epochs = [epoch.numbers() for epoch in result.history]
    # epochs from before a measure came do not have it
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch))
    lines = [[epoch.get(name, "") for name in names] for epoch in epochs]
    write_text(out / "history.csv", _csv([columns.get(name, name) for name in names], lines))
    accuracy = {f"last_{scored}_accuracy": result.last, f"best_{scored}_accuracy": result.best}
    numbers = {"config": asdict(result.config), **accuracy, "step_ms": result.step_ms, "seconds": result.seconds}
    write_json(out / "result.json", numbers | {"environment": environment(result.config.device)})
    _save(out / "curve.png", _curve(result))


def _save(path: Path, figure: Figure) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _figure(width: float, height: float, rows: int, columns: int = 2) -> tuple[Figure, Any]:
    # not pyplot: no window system, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _title(config: Config) -> str:
    noise = f", {config.label_noise:.0%} label noise" if config.label_noise else ""
    return f"{config.label}: {short(config.data)}, {config.model}{noise}, seed {config.seed}"


def _curve(result: Result) -> Figure:
    sharpness = [e.sharpness for e in result.history if e.sharpness is not None]
    figure, axes = _figure(9, 3.6, rows=1) if not sharpness else _figure(12, 3.6, rows=1, columns=3)
    accuracy, loss = axes[0, :2]
    epochs = [e.epoch for e in result.history]
    dots = "." if len(epochs) < 40 else None
    labels = "noisy training labels" if result.config.label_noise else "training set"
    scored = f"{SCORED_ON[result.config.scored_on]} {'set' if result.config.scored_on == 'test' else 'part'}"
    accuracy.plot(epochs, [e.train_accuracy for e in result.history], marker=dots, color="C7", label=labels)
    accuracy.plot(epochs, [e.accuracy for e in result.history], marker=dots, color="C0", label=scored)
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    accuracy.legend(frameon=False)
    loss.plot(epochs, [e.train_loss for e in result.history], marker=dots, color="C7")
    loss.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    if sharpness:
        axes[0, 2].plot(epochs, sharpness, marker=dots, color="C3")
        axes[0, 2].set(xlabel="epoch", ylabel="sharpness, rho 0.05")
    figure.suptitle(_title(result.config))
    return figure


# a comparison


def write_comparison(out: Path, comparison: Comparison) -> None:
    """Write results.json, results.csv, comparison.png and table.md.

    Args:
        out: an existing directory.
        comparison: a finished one.

    Raises:
        InputError: a file cannot be written.
    """
    about = environment(comparison.plan.device)
    columns = [*RUN_COLUMNS, *(("sharpness", "lambda_max", "lambda_ratio") if comparison.flatness else ())]
    measured = [[f.sharpness, f.lambda_max, f.ratio] for f in comparison.flatness] or [[]] * len(comparison.results)
    runs = [_run_row(result) + more for result, more in zip(comparison.results, measured, strict=True)]
    chosen = [asdict(choice) for choice in comparison.choices]
    curves = [[epoch.numbers() for epoch in result.history] for result in comparison.results]
    dicts = [dict(zip(columns, run, strict=True)) | {"history": c} for run, c in zip(runs, curves, strict=True)]
    write_json(
        out / "results.json",
        {
            "plan": asdict(comparison.plan),
            "table": [asdict(row) for row in comparison.rows],
            "choices": chosen,
            "runs": dicts,
            "environment": about,
        },
    )
    write_text(out / "results.csv", _csv(columns, runs))
    write_text(out / "table.md", _markdown(comparison))
    _save(out / "comparison.png", _comparison_figure(comparison))


def _run_row(result: Result) -> list[Any]:
    config, tuned = result.config, METHODS[result.config.method].tuned
    value = config.options[tuned] if tuned else ""
    numbers = [result.last, result.best, result.step_ms, result.seconds]
    return [config.label_noise, config.method, tuned or "", value, config.seed, *numbers]


def headers(plan: Plan) -> list[str]:
    """Return the columns of a plan's table."""
    flatness = ["sharpness", "lambda"] if plan.sharpness else []
    return ["noise", "method", "chosen", "last (%)", "best (%)", "step", "run", *flatness]


def cells(row: Row, plan: Plan) -> list[str]:
    """Return a row of the table, one text for each of `headers`.

    Args:
        row: its numbers.
        plan: of the comparison.
    """
    spread = f" ± {row.interval_last:.1f}" if row.interval_last is not None else ""
    ratio = f" ({row.step_ratio:.2f}x {row.base})" if row.step_ratio is not None else ""
    flatness = [row.sharpness, row.lambda_max] if plan.sharpness else []
    return [
        f"{row.label_noise:.0%}",
        row.method,
        f"{row.tuned} {row.value:g}" if row.tuned else "-",
        f"{row.mean_last:.1f}{spread}",
        f"{row.mean_best:.1f}",
        f"{row.step_ms:.1f} ms{ratio}",
        f"{row.seconds:.1f} s",
        *("-" if value is None else f"{value:.3g}" for value in flatness),
    ]


def caption(comparison: Comparison) -> str:
    """Return what the table's numbers are and where they come from."""
    plan, about = comparison.plan, environment(comparison.plan.device)
    choice = (
        "chosen: after the last epoch on a held-out tenth of the training set, with seed 0; ties go to the smallest. "
    )
    chosen = choice if comparison.choices else ""
    seeds = seeds_caption(plan.seeds)
    return (
        f"Test accuracy on clean labels of {short(plan.data)}, {plan.model}, {plan.epochs} epochs, batch "
        f"{plan.batch_size}; {seeds}. last: after the last epoch. best: the best epoch, picked with the test set. "
        f"{chosen}step: median training step, with its ratio to the base's in this comparison. run: median time in "
        f"training steps. {_recipe(plan.base, plan.schedule, plan.warmup, plan.clip, plan.init, plan.freeze_bn)}"
        f"{_flatness_caption(plan)}"
        f"{about['device']}, threads: {about['threads']}, torch {about['torch']}, amp {plan.amp}"
        f"{', channels last' if plan.channels_last else ''}{', compiled' if plan.compile else ''}."
    )


def _recipe(
    base: str | None, schedule: str, warmup: float | None, clip: float | None, init: str | None, freeze_bn: bool
) -> str:
    """Return what was asked for beside the usual, a sentence or nothing."""
    parts = [f"methods around {base}"] if base else []
    parts += [f"schedule {schedule}"] if schedule != "cosine" else []
    parts += [f"warm-up {warmup:g} epochs"] if warmup else []
    parts += [f"gradients clipped at {clip:g}"] if clip else []
    parts += [f"weights from {short(init)}"] if init else []
    parts += ["batch norm's statistics frozen"] if freeze_bn else []
    text = ", ".join(parts)
    return f"{text[:1].upper()}{text[1:]}. " if text else ""


def seeds_caption(seeds: int) -> str:
    """Return what the numbers after a mean are."""
    return f"seeds 0 to {seeds - 1}, mean ± 95 % interval of it (Student's t)" if seeds > 1 else "seed 0"


def _flatness_caption(plan: Plan) -> str:
    if not plan.sharpness:
        return ""
    return (
        "sharpness: by how much the training loss rises along SAM's perturbation, rho 0.05, of each 64 pictures. "
        "lambda: largest eigenvalue of its Hessian. Both: means over the seeds, on up to "
        f"{FLATNESS_SAMPLES} training pictures with the labels trained on, batch norm in eval mode. "
    )


def _markdown(comparison: Comparison) -> str:
    plan = comparison.plan
    return _markdown_table(headers(plan), [cells(row, plan) for row in comparison.rows], caption(comparison))


def _markdown_table(names: list[str], rows: list[list[str]], below: str) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{below}\n"


def _comparison_figure(comparison: Comparison) -> Figure:
    noises = comparison.plan.label_noise
    figure, axes = _figure(10, 0.8 + 3.4 * len(noises), rows=len(noises))
    for noise, (over_epochs, over_time) in zip(noises, axes, strict=True):
        rows = [row for row in comparison.rows if row.label_noise == noise]
        for row in rows:
            _draw(over_epochs, over_time, comparison, row)
        low, high = _limits(comparison, noise)
        for axis in (over_epochs, over_time):
            axis.set(ylim=(low, high), ylabel="test accuracy (%)")
        over_epochs.set(xlabel="epoch", title=f"{noise:.0%} label noise", xlim=(0, None))
        over_time.set(xlabel="seconds of training steps", title=f"{noise:.0%} label noise, by time", xlim=(0, None))
        over_time.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plan = comparison.plan
    band = f"mean and range of {plan.seeds} seeds" if plan.seeds > 1 else "one seed"
    figure.suptitle(f"{short(plan.data)}, {plan.model}: {band}")
    return figure


def _draw(over_epochs: Axes, over_time: Axes, comparison: Comparison, row: Row) -> None:
    histories = [r.history for r in comparison.of(row.label_noise, row.method)]
    by_epoch = [[epoch.accuracy for epoch in epochs] for epochs in zip(*histories, strict=True)]
    # medians, since one seed that had to share the machine for a while would stretch the whole curve
    seconds = [statistics.median(epoch.seconds for epoch in epochs) for epochs in zip(*histories, strict=True)]
    times = [sum(seconds[: i + 1]) for i in range(len(seconds))]
    color = f"C{list(METHODS).index(row.method)}"
    label = f"{row.method} ({row.tuned} {row.value:g})" if row.tuned else row.method
    for axis, x in ((over_epochs, list(range(1, len(times) + 1))), (over_time, times)):
        # a line of one point is invisible
        marker = "." if len(x) == 1 else None
        axis.plot(x, [statistics.mean(a) for a in by_epoch], color=color, label=label, marker=marker)
        axis.fill_between(x, [min(a) for a in by_epoch], [max(a) for a in by_epoch], color=color, alpha=0.2, lw=0)


def _limits(comparison: Comparison, noise: float) -> tuple[float, float]:
    """Leave the first epochs out of sight where the rest would be squeezed at the top."""
    results = [result for result in comparison.results if result.config.label_noise == noise]
    settled = comparison.plan.epochs // 10
    values = [epoch.accuracy for result in results for epoch in result.history[settled:]]
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.5)
    return low - margin, min(high + margin, 100.5)


# a sweep


def write_sweep(out: Path, sweep: Sweep) -> None:
    """Write results.json, results.csv and table.md.

    Args:
        out: an existing directory.
        sweep: a finished one.

    Raises:
        InputError: a file cannot be written.
    """
    plan = sweep.plan
    columns = [*plan.over, "seed", "last_accuracy", "best_accuracy", "step_ms", "seconds"]
    runs = [
        [*point.values(), r.config.seed, r.last, r.best, r.step_ms, r.seconds]
        for point, r in zip(sweep.points, sweep.results, strict=True)
    ]
    curves = [[epoch.numbers() for epoch in result.history] for result in sweep.results]
    dicts = [dict(zip(columns, run, strict=True)) | {"history": c} for run, c in zip(runs, curves, strict=True)]
    table = [asdict(row) for row in sweep.rows]
    about = environment(plan.settings["device"])
    write_json(out / "results.json", {"plan": asdict(plan), "table": table, "runs": dicts, "environment": about})
    write_text(out / "results.csv", _csv(columns, runs))
    rows = [sweep_cells(row) for row in sweep.rows]
    write_text(out / "table.md", _markdown_table(sweep_headers(plan), rows, sweep_caption(sweep)))


def sweep_headers(plan: SweepPlan) -> list[str]:
    """Return the columns of a sweep's table."""
    return [*(name.replace("_", "-") for name in plan.over), "last (%)", "best (%)", "step", "run"]


def sweep_cells(row: SweepRow) -> list[str]:
    """Return a row of a sweep's table, one text for each of `sweep_headers`."""
    spread = f" ± {row.interval_last:.1f}" if row.interval_last is not None else ""
    numbers = [f"{row.mean_last:.1f}{spread}", f"{row.mean_best:.1f}", f"{row.step_ms:.1f} ms", f"{row.seconds:.1f} s"]
    return [*map(shown, row.point.values()), *numbers]


def sweep_caption(sweep: Sweep) -> str:
    """Return what a sweep's numbers are and where they come from."""
    plan, config = sweep.plan, sweep.results[0].config
    about = environment(config.device)
    scored = "test" if config.scored_on == "test" else "held-out"
    labels = f", {config.label_noise:.0%} label noise" if config.label_noise and "label_noise" not in plan.over else ""
    fixed = [getattr(config, n) if n not in plan.over else None for n in ("schedule", "warmup", "clip")]
    recipe = _recipe(None, fixed[0] or "cosine", fixed[1], fixed[2], config.init, config.freeze_bn)
    around = f" around {config.base}" if config.base != config.method and "base" not in plan.over else ""
    return (
        f"Highest after the last epoch: {words(sweep.highest.point)}. {scored.capitalize()} accuracy of "
        f"{config.method}{around} on {short(config.data)}, {config.model}{labels}; {seeds_caption(plan.seeds)}. last: "
        f"after the last epoch. best: the best epoch, picked with the {scored} part. step: median training step. run: "
        f"median time in training steps. {recipe}{about['device']}, threads: {about['threads']}, torch "
        f"{about['torch']}, amp {config.amp}."
    )
