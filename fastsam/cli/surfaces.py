"""Pictures of landscapes: surfaces with contours, and lines, of several models on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsam.cli.files import replacing, write_json
from fastsam.sharpness import Landscape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES: Any = {"font.size": 13, "axes.titlesize": 15, "axes.labelsize": 13, "xtick.labelsize": 11, "ytick.labelsize": 11}
"""Letters that can be read where a picture is as wide as a phone."""
LOSS = "mean cross-entropy (nats)"
ALONG = "filter lengths"
"""The unit of a coordinate: each filter changes by this many times its own length."""
_WIDE_RANGE = 30
"""Ratio of the largest to the smallest loss from which a scale of orders of magnitude shows more."""
_COLORS = "viridis"


def write_landscapes(out: Path, labels: Sequence[str], landscapes: Sequence[Landscape], title: str) -> None:
    """Write a picture of landscapes, all on one scale.

    Args:
        out: the PNG's path.
        labels: one for each.
        landscapes: of one or of two dimensions, on the same points.
        title: what they have in common.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib

    # of these figures alone
    with matplotlib.rc_context(SIZES):
        means = [found.mean for found in landscapes]
        draw = _lines if means[0].dim() == 1 else _surfaces
        _save(out, draw(labels, landscapes[0].at, means, title, f"distance along one direction ({ALONG})"))


def write_line(out: Path, ends: tuple[str, str], found: Landscape, title: str) -> None:
    """Write a picture of the losses on the line from one model to another.

    Args:
        out: the PNG's path.
        ends: what the models at 0 and 1 are called.
        found: the losses.
        title: what they have in common.

    Raises:
        InputError: the file cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context(SIZES):
        figure = _lines([""], found.at, [found.mean], title, f"0: {ends[0]}\n1: {ends[1]}")
        for end in (0, 1):
            figure.axes[0].axvline(end, color="0.6", lw=1, zorder=0)
        _save(out, figure)


def write_numbers(out: Path, labels: Sequence[str], landscapes: Sequence[Landscape], about: dict[str, Any]) -> None:
    """Write the numbers of a picture as JSON, null where a loss is missing.

    Args:
        out: the file's path.
        labels: one for each landscape.
        landscapes: what the picture shows.
        about: what is said beside them.

    Raises:
        InputError: the file cannot be written.
    """
    models = [
        {"label": label, "at": found.at.tolist(), "losses": found.losses.tolist(), "samples": found.samples}
        for label, found in zip(labels, landscapes, strict=True)
    ]
    write_json(out, {"models": models, **about})


def _save(out: Path, figure: Figure) -> None:
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _range(means: Sequence[Tensor]) -> tuple[float, float, bool]:
    """Return the smallest and largest loss of all, and whether they need a scale of orders of magnitude."""
    values = torch.cat([mean.flatten() for mean in means])
    values = values[values.isfinite()]
    if not len(values):
        return 0.0, 1.0, False
    low, high = float(values.min()), float(values.max())
    if low == high:
        # a scale needs some room
        return low - 0.5, high + 0.5, False
    return low, high, low > 0 and high / low > _WIDE_RANGE


def _lines(labels: Sequence[str], at: Tensor, means: Sequence[Tensor], title: str, along: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for label, mean in zip(labels, means, strict=True):
        axis.plot(at.numpy(), mean.numpy(), marker="o", ms=4, lw=2, label=label)
    axis.set(xlabel=along, ylabel=LOSS)
    low, high, is_wide = _range(means)
    if is_wide:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    elif low >= 0:
        axis.set_ylim(0, 1.05 * high or 1)
    if any(labels):
        axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title + _missing(means))
    return figure


def _surfaces(labels: Sequence[str], at: Tensor, means: Sequence[Tensor], title: str, _: str) -> Figure:
    from matplotlib import cm
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure

    low, high, is_wide = _range(means)
    scale = LogNorm(low, high) if is_wide else Normalize(low, high)
    figure = Figure(figsize=(9, 1.2 + 4.4 * len(means)), layout="constrained")
    parts = figure.subfigures(len(means), 1, squeeze=False)[:, 0]
    for part, label, mean in zip(parts, labels, means, strict=True):
        part.suptitle(label, fontsize=14)
        _draw_surface(part.add_subplot(1, 2, 1, projection="3d"), at, mean, scale, is_wide)
        contour = part.add_subplot(1, 2, 2)
        _draw_contour(contour, at, mean, scale, is_wide)
        bar = part.colorbar(cm.ScalarMappable(scale, _COLORS), ax=contour, shrink=0.8)
        bar.set_label(LOSS)
        if is_wide:
            _plain_ticks(bar.ax.yaxis)
    figure.suptitle(title + _missing(means), fontsize=15, fontweight="bold")
    return figure


def _draw_surface(axis: Any, at: Tensor, mean: Tensor, scale: Any, is_wide: bool) -> None:
    from matplotlib import colormaps

    first, second = torch.meshgrid(at, at, indexing="ij")
    heights = mean.log10() if is_wide else mean
    colors = colormaps[_COLORS](scale(mean.numpy()))
    axis.plot_surface(
        first.numpy(), second.numpy(), heights.numpy(), facecolors=colors, rstride=1, cstride=1, lw=0.2, shade=False
    )
    low, high = (math.log10(scale.vmin), math.log10(scale.vmax)) if is_wide else (scale.vmin, scale.vmax)
    axis.set_zlim(low, high)
    if is_wide:
        ticks = _levels(scale, is_wide)[:: 2 if scale.vmax / scale.vmin > 100 else 1]
        axis.set_zticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    else:
        axis.zaxis.get_major_locator().set_params(nbins=5)
    for one in (axis.xaxis, axis.yaxis):
        one.get_major_locator().set_params(nbins=4)
    axis.tick_params(pad=0)
    axis.set_xlabel("direction 1")
    axis.set_ylabel("direction 2")
    axis.view_init(elev=28, azim=-60)
    axis.set_box_aspect((1, 1, 0.8), zoom=0.9)


def _draw_contour(axis: Any, at: Tensor, mean: Tensor, scale: Any, is_wide: bool) -> None:
    places, values, levels = at.numpy(), mean.T.numpy(), _levels(scale, is_wide)
    # missing points stay grey
    axis.set_facecolor("0.85")
    axis.pcolormesh(places, places, values, norm=scale, cmap=_COLORS, shading="nearest")
    if levels:
        lines = axis.contour(places, places, values, levels=levels, colors="white", linewidths=1)
        axis.clabel(lines, fmt="%.2g", fontsize=11)
    axis.plot(0, 0, marker="+", ms=12, mew=2, color="white")
    axis.set(xlabel=f"direction 1 ({ALONG})", ylabel="direction 2", aspect="equal")
    for one in (axis.xaxis, axis.yaxis):
        one.get_major_locator().set_params(nbins=5)


def _levels(scale: Any, is_wide: bool) -> list[float]:
    """Return round losses within a scale."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(8)
    return [float(v) for v in locator.tick_values(scale.vmin, scale.vmax) if scale.vmin < v < scale.vmax]


def _plain_ticks(axis: Any) -> None:
    """Let a logarithmic axis say 0.5, 1, 2, 5, 10 rather than powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _missing(means: Sequence[Tensor]) -> str:
    count = sum(int(mean.isnan().sum()) for mean in means)
    points = "point has" if count == 1 else "points have"
    return f"\n{count} {points} no finite loss" if count else ""
