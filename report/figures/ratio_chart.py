"""The modules with the highest max-median ratios, as bars, and what became of them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.report.figures.drawing import Drawing
from spike_export.report.figures.style import (
    GRID,
    INK,
    INT8_COLOUR,
    KEPT_COLOUR,
    PAPER,
    STYLE,
    UNDECIDED_COLOUR,
    drawable,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP_MODULES = 30


def ratio_chart(
    statistics: SpikeStatistics,
    recipe: Recipe | None = None,
    before: SpikeStatistics | None = None,
    top: int = TOP_MODULES,
) -> Drawing | None:
    """Draw the highest max-median ratios as bars, coloured by what became of the module.

    Args:
        statistics: What the precision was chosen by (with the prefix in place, when there is one).
        recipe: Gives precision and alpha; without it all bars are grey.
        before: Statistics without the prefix, marked on each bar.
        top: How many bars.
    """
    ratios, earlier = statistics.ratios(), before.ratios() if before is not None else {}
    names = highest_ratios(statistics, before, top)
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 1.5 + 0.21 * len(names)), layout="constrained")
        axes = figure.subplots()
        rows = range(len(names))
        drawing = Drawing(figure)
        bars = axes.barh(rows, [ratios[name] for name in names], height=0.72, zorder=2)
        for bar, name in zip(bars, names, strict=True):
            colour, hatch = _bar_style(name, recipe)
            bar.set(facecolor=colour, hatch=hatch, edgecolor=INK if hatch else colour, linewidth=0.5)
            drawing.tell(bar, _bar_text(name, ratios[name], earlier.get(name), recipe))
        entries = _bar_legend(names, recipe)
        if earlier:
            entries.append(_mark_before(axes, names, earlier))
        if recipe is not None and recipe.alpha is not None and drawable(recipe.alpha):
            entries.append(axes.axvline(recipe.alpha, color=INK, linestyle="--", linewidth=1.2, zorder=3))
            entries[-1].set_label(f"alpha = {recipe.alpha:.4g}")
        _label_bars(axes, names, bool(statistics.prefix_ids))
        axes.legend(handles=entries, loc="lower right", frameon=True, framealpha=1.0, fontsize=9)
        return drawing


def highest_ratios(
    statistics: SpikeStatistics, before: SpikeStatistics | None = None, top: int = TOP_MODULES
) -> list[str]:
    """Return the modules that the chart shows, in order of their ratios.

    A spike that the prefix removed is worth its bar: modules are taken by the higher of both ratios.
    """
    ratios = {name: ratio for name, ratio in statistics.ratios().items() if drawable(ratio)}
    earlier = before.ratios() if before is not None else {}
    highest = sorted(ratios, key=lambda name: -max(ratios[name], earlier.get(name, 0.0)))[:top]
    return [name for name in ratios if name in highest]


def _bar_text(name: str, ratio: float, earlier: float | None, recipe: Recipe | None) -> str:
    plan = recipe.modules.get(name) if recipe is not None else None
    before = "" if earlier is None else f", {earlier:,.1f} without the prefix"
    return f"{name}: ratio {ratio:,.1f}{before}" + ("" if plan is None else f"; {plan.precision}")


def _mark_before(axes: "Axes", names: Sequence[str], earlier: Mapping[str, float]) -> Line2D:
    marks = [(row, earlier[name]) for row, name in enumerate(names) if drawable(earlier.get(name, math.nan))]
    (line,) = axes.plot(
        [ratio for _, ratio in marks],
        [row for row, _ in marks],
        linestyle="none",
        marker="D",
        markersize=4.5,
        markerfacecolor=PAPER,
        markeredgecolor=INK,
        zorder=4,
        label="the same module without the prefix",
    )
    return line


def _label_bars(axes: "Axes", names: Sequence[str], prefixed: bool) -> None:
    # Names come from a file: a dollar sign must not be read as a formula.
    axes.set_yticks(range(len(names)), [short_name(name) for name in names], fontsize=8.5, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(left=1.0)
    axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(axis="y", length=0)
    where = ", with the prefix in place" if prefixed else ""
    axes.set_xlabel(f"max-median ratio of the module's input{where} (log scale)")


def _bar_style(name: str, recipe: Recipe | None) -> tuple[str, str | None]:
    plan = recipe.modules.get(name) if recipe is not None else None
    if plan is None:
        return UNDECIDED_COLOUR, None
    return (INT8_COLOUR, None) if plan.number_format else (KEPT_COLOUR, "///")


def _bar_legend(names: Sequence[str], recipe: Recipe | None) -> list[Patch | Line2D]:
    kept = recipe.scheme.unquantized if recipe is not None else ""
    labels: Mapping[str, str] = {
        KEPT_COLOUR: f"kept ({kept})",
        INT8_COLOUR: "INT8",
        UNDECIDED_COLOUR: "no recipe",
    }
    used = {_bar_style(name, recipe) for name in names}
    return [
        Patch(facecolor=colour, hatch=hatch, edgecolor=INK if hatch else colour, label=labels[colour])
        for colour, hatch in sorted(used, key=lambda style: list(labels).index(style[0]))
    ]
