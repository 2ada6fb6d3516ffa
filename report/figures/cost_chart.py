"""What quantization costs on each text: the perplexity's increase and the divergence, with their intervals."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from spike_export.artifacts.results.check_document import CheckCost, CheckInterval
from spike_export.report.figures.drawing import Drawing
from spike_export.report.figures.style import GRID, INK, INT8_COLOUR, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cost_chart(costs: Mapping[str, CheckCost]) -> Drawing | None:
    """Draw the cost by text.

    Args:
        costs: Name of the text → what the shipped variant costs there.
    """
    if not costs:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 1.3 + 0.42 * len(costs)), layout="constrained")
        drawing = Drawing(figure)
        increase, divergence = figure.subplots(1, 2, sharey=True)
        _draw(drawing, increase, costs, "perplexity's increase in %", lambda cost: _scaled(cost.increase, 100.0))
        _draw(drawing, divergence, costs, "KL divergence, nats per token", lambda cost: cost.divergence)
        increase.set_yticks(range(len(costs)), list(costs), parse_math=False)
        increase.set_ylim(len(costs) - 0.5, -0.5)
        increase.axvline(0.0, color=INK, linewidth=1.0, zorder=1)
        divergence.set_xlim(left=0.0)
        return drawing


def _scaled(interval: CheckInterval, factor: float) -> CheckInterval:
    return CheckInterval(mean=factor * interval.mean, margin=factor * interval.margin)


def _draw(
    drawing: Drawing,
    axes: "Axes",
    costs: Mapping[str, CheckCost],
    label: str,
    value: Callable[[CheckCost], CheckInterval],
) -> None:
    for row, (name, cost) in enumerate(costs.items()):
        found = value(cost)
        axes.plot([found.low, found.high], [row, row], color=INT8_COLOUR, linewidth=3.0, alpha=0.45, zorder=2)
        (point,) = axes.plot([found.mean], [row], "o", color=INT8_COLOUR, markersize=8, zorder=3)
        drawing.tell(point, f"{name}: {found.mean:.4g} +/- {found.margin:.2g} ({label})")
    axes.set_xlabel(label)
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(axis="y", length=0)
