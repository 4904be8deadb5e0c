"""What `python -m benchmarks steps` found, as a table and as a picture."""

from pathlib import Path
from typing import Any

_LONGEST = 5.0
"""Bars are cut there: one slow method would leave no room for the others."""


def _cell(value: float | None, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>9}"


def table(model: str, regime: str, about: dict[str, Any], found: dict[str, Any]) -> str:
    """One regime of one model as lines of text."""
    arms = found["arms"]
    on_gpu = any(row["launches"] is not None for row in arms.values())
    calls, head = ("launches", "launches") if on_gpu else ("operator calls", "op calls")
    columns = ("ms", "/ stock", "/ fused", "/ base", "MB /base", head, "reads")
    lines = [
        f"{model}, {regime}: {about['base']}, batch {about['rows']}; "
        "rows: forward (without a graph) / backward; weight gradients",
        f"  {'':26}" + "".join(f"{column:>9}" for column in columns),
    ]
    for name, row in arms.items():
        peak, p = row["peak memory over base"], row["passes"]
        cells = [
            _cell(row["milliseconds"], ".2f"),
            *(_cell(row[f"over {other}"], ".3f") for other in ("stock", "fused", "base")),
            _cell(None if peak is None else peak / 1e6, ".1f"),
            _cell(row[calls], ".1f"),
            _cell(row["host reads"], ".1f"),
        ]
        passes = p and (
            f"   {p['forward rows']:.2f} ({p['forward rows without graph']:.2f}) / {p['backward rows']:.2f}; "
            f"{p['weight gradients']:.2f}"
        )
        lines.append(f"  {name:26}" + "".join(cells) + (passes or ""))
    lines += [f"  {name:26} {reason}" for name, reason in found["not run"].items()]
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw each method's step time over the stock base's: a panel for each model, bars grouped by regime.

    A bar's label is that ratio, and outside eager mode the one over the same regime's base too. The band is where the
    base's second arm fell from round to round: what differs by less is noise.
    """
    from matplotlib.figure import Figure

    models = record["models"]
    heights = [sum(len(found["arms"]) + 2 for found in model["regimes"].values()) for model in models.values()]
    figure = Figure(figsize=(9, 0.7 * len(models) + 0.22 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(models), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (name, model) in zip(panels, models.items(), strict=True):
        _draw_model(axes, model)
        axes.set_title(f"{name}: step time over eager {model['base']}, batch {model['rows']}", loc="left")
    figure.supxlabel(f"{record['environment']['device']}; bands: the base's own noise", fontsize="small")
    figure.savefig(path, dpi=120)


def _draw_model(axes: Any, model: dict[str, Any]) -> None:
    shown = {regime: found for regime, found in model["regimes"].items() if found["arms"]}
    most = max(row["over stock"] for found in shown.values() for row in found["arms"].values())
    end = min(most, _LONGEST)
    axes.set_xlim(0, end * 1.45)
    ticks: list[int] = []
    y = 0
    for i, (regime, found) in enumerate(shown.items()):
        arms, places = found["arms"], range(y + 1, y + 1 + len(found["arms"]))
        axes.barh(places, [min(row["over stock"], end) for row in arms.values()], color=f"C{i}", zorder=2)
        axes.text(0.01 * end, y, regime, fontsize="small", va="center", color=f"C{i}", weight="bold")
        for place, row in zip(places, arms.values(), strict=True):
            own = "" if regime == "eager" else f" ({row['over base']:.2f} over its base)"
            label = f"{row['over stock']:.2f}{own}{', cut' if row['over stock'] > end else ''}"
            axes.text(min(row["over stock"], end) + 0.01 * end, place, label, fontsize="small", va="center", zorder=4)
        if found["noise"]:
            low, high = (arms["base"]["over stock"] * edge for edge in found["noise"])
            axes.fill_betweenx([y + 0.5, y + len(arms) + 0.5], low, high, color="black", alpha=0.2, lw=0, zorder=3)
        ticks, y = [*ticks, *places], y + len(arms) + 1
    axes.set_yticks(ticks, [name for found in shown.values() for name in found["arms"]], fontsize="small")
    axes.axvline(1, color="0.6", linewidth=0.8, zorder=1)
    axes.set_ylim(y, -0.8)
