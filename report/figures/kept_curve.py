"""The choice of the modules in 16 bit: perplexity by their number."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from spike_export.artifacts.recipe import CurvePoint
from spike_export.report.figures.drawing import Drawing
from spike_export.report.figures.style import CHOSEN_COLOUR, GRID, INK, INT8_COLOUR, STYLE, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def qfem_curve(
    curve: Sequence[CurvePoint], reference: float | None, chosen: int | None, precision: str
) -> Drawing | None:
    """Draw perplexity against the number of kept linears.

    Args:
        curve: Evaluated sets.
        reference: Perplexity with nothing quantized.
        chosen: Number of linears that the recipe keeps; its point is marked when it was evaluated.
        precision: Format of the kept linears, for the labels.
    """
    points = sorted({(point.fp16_modules, point.perplexity) for point in curve if drawable(point.perplexity)})
    if not points:
        return None
    counts, perplexities = [count for count, _ in points], [perplexity for _, perplexity in points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        axes = figure.subplots()
        drawing = Drawing(figure)
        axes.plot(counts, perplexities, color=INT8_COLOUR, zorder=2, label="the rest in INT8")
        for count, perplexity in points:
            (point,) = axes.plot([count], [perplexity], "o", color=INT8_COLOUR, markersize=5, zorder=5)
            drawing.tell(point, f"{count} linears kept: perplexity {perplexity:.5g}")
        if reference is not None and drawable(reference):
            label = f"nothing quantized, {precision}: {reference:.4g}"
            axes.axhline(reference, color=INK, linestyle="--", linewidth=1.2, zorder=2, label=label)
        if chosen in counts:
            perplexity = perplexities[counts.index(chosen)]
            label = f"the recipe: {chosen} kept, {perplexity:.4g}"
            (mark,) = axes.plot([chosen], [perplexity], "o", markersize=12, zorder=4, label=label)
            mark.set(markerfacecolor="none", markeredgecolor=CHOSEN_COLOUR, markeredgewidth=2.2)
        _scale_counts(axes, max(counts))
        axes.set_xlabel(f"linears kept in {precision}")
        axes.set_ylabel("perplexity (calibration)")
        axes.grid(color=GRID, linewidth=0.8, zorder=0)
        axes.legend(frameon=True, framealpha=1.0, fontsize=9)
        return drawing


def _scale_counts(axes: "Axes", most: int) -> None:
    """Spread small counts: the search doubles them, and the first few modules bring nearly all of the gain."""
    if most <= 8:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    axes.set_xscale("symlog", base=2, linthresh=1)
    doubling = [2**power for power in range(most.bit_length() + 1)]
    axes.xaxis.set_major_locator(FixedLocator([0, *doubling]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlim(-0.15, most * 1.12)
