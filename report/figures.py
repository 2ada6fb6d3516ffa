"""Pictures of activation spikes and of the QFeM choice, as SVG text: pure functions, no display, no global state.

Every picture has a light background of its own, so that it stays legible on a dark page, and colours that
colour-blind readers tell apart (Okabe-Ito; kept modules are hatched as well). The same values give the same bytes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from spike_export.artifacts.recipe import CurvePoint, Recipe
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.modules import is_down_projection, split_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INT8_COLOUR = "#0072B2"
KEPT_COLOUR = "#E69F00"
UNDECIDED_COLOUR = "#7F7F7F"
CHOSEN_COLOUR = "#D55E00"
INK = "#1A1A1A"
PAPER = "#FFFFFF"
GRID = "#DDDDDD"

SINGLE_POSITIONS = 64
"""Positions drawn one cell each; spikes sit at the first tokens."""

CELLS_PER_OCTAVE = 16
"""Cells for each doubling of the position after that."""

RASTER_DPI = 200
"""Resolution of the heat map's cells inside the SVG; everything else stays vector."""

# Any: the type stubs spell out every key of matplotlib as a literal.
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, selectable, small
    "svg.hashsalt": "spike-export",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


@dataclass(frozen=True)
class SpikeMap:
    """What the heat map shows.

    Attributes:
        layers: [rows] layer numbers, ascending.
        edges: [cells + 1] first position of each cell, and the end of the last.
        amax: [rows, cells] float64; maximum over samples and over the positions of the cell.
    """

    layers: tuple[int, ...]
    edges: NDArray[np.int64]
    amax: NDArray[np.float64]


def spike_map(statistics: SpikeStatistics) -> SpikeMap | None:
    """Gather the down projections' token scales by layer and position; None when there is no such module.

    The experts of one layer are drawn as one row, by their maximum.
    """
    rows: dict[int, NDArray[np.float64]] = {}
    for name, spikes in statistics.modules.items():
        if not is_down_projection(name) or spikes.token_amax.size == 0:
            continue
        layer = _layer(name)
        if layer is not None:
            # NaN stands where an expert was not given the token; every token has some expert.
            row = np.fmax.reduce(spikes.token_amax, axis=0).astype(np.float64)
            rows[layer] = np.fmax(rows[layer], row) if layer in rows else row
    if not rows:
        return None
    edges = position_edges(min(row.size for row in rows.values()))
    layers = tuple(sorted(rows))
    amax = np.stack([np.maximum.reduceat(rows[layer][: edges[-1]], edges[:-1]) for layer in layers])
    return SpikeMap(layers, edges, amax)


def position_edges(tokens: int) -> NDArray[np.int64]:
    """Return the cell edges for `tokens` positions: the first ones single, then cells that widen like a logarithm."""
    single = min(tokens, SINGLE_POSITIONS)
    octaves = math.log2(tokens / single)
    later = single * 2.0 ** (np.arange(1, math.ceil(octaves * CELLS_PER_OCTAVE)) / CELLS_PER_OCTAVE)
    return np.unique(np.concatenate([np.arange(single + 1), later.astype(np.int64), [tokens]])).astype(np.int64)


def spike_picture(before: SpikeStatistics, after: SpikeStatistics | None = None) -> Figure | None:
    """Draw the spikes at the down projections' inputs, layer by position, without and with the prefix.

    Args:
        before: Statistics without a prefix.
        after: Statistics with the prefix in place; None for a single panel.

    Returns:
        The figure, or None when no module is a down projection.
    """
    titled = [("Without prefix", spike_map(before))]
    if after is not None:
        count = len(after.prefix_ids)
        titled.append((f"With the prefix ({count} token{'' if count == 1 else 's'}) in place", spike_map(after)))
    maps = [(title, picture) for title, picture in titled if picture is not None]
    if not maps:
        return None
    with matplotlib.rc_context(_STYLE):
        rows = max(len(picture.layers) for _, picture in maps)
        figure = Figure(figsize=(10.0, min(7.5, 1.9 + 0.085 * max(rows, 14))), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
        norm = _shared_norm([picture.amax for _, picture in maps])
        for panel, (title, picture) in zip(axes, maps, strict=True):
            _draw_map(panel, picture, norm)
            panel.set_title(title, fontsize=11)
        axes[0].set_ylabel("decoder layer")
        colours = figure.colorbar(axes[0].collections[0], ax=list(axes), pad=0.015, aspect=30)
        colours.set_label("largest |activation| of the token (log scale)")
        return figure


def _shared_norm(maps: Sequence[NDArray[np.float64]]) -> LogNorm:
    values = np.concatenate([amax.ravel() for amax in maps])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size == 0:
        return LogNorm(0.1, 1.0)
    # From the bulk upwards: a handful of tiny cells would use up half of the colours.
    low, high = float(np.quantile(values, 0.02)), float(values.max())
    return LogNorm(low, max(high, low * 10))


def _draw_map(axes: "Axes", picture: SpikeMap, norm: LogNorm) -> None:
    # Zeros lie below a log scale and are drawn in its lowest colour; NaN stays blank.
    image = np.maximum(picture.amax, np.finfo(np.float64).tiny)
    rows = np.arange(len(picture.layers) + 1) - 0.5
    axes.pcolormesh(_stretched(picture.edges), rows, image, norm=norm, cmap="inferno", rasterized=True)
    ticks = [position for position in (0, *(2**power for power in range(20))) if position < picture.edges[-1]]
    middles = (_stretched(np.array(ticks)) + _stretched(np.array(ticks) + 1)) / 2
    axes.set_xticks(list(middles), [str(position) for position in ticks])
    step = max(1, math.ceil(len(picture.layers) / 12))
    axes.set_yticks(list(range(0, len(picture.layers), step)), [str(layer) for layer in picture.layers[::step]])
    axes.set_xlabel("token position (log scale)")


def _stretched(positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Place positions on the axis: a logarithm gives the first tokens, where the spikes are, the widest cells."""
    stretched: NDArray[np.float64] = np.log2(positions + 1.0)
    return stretched


def ratio_chart(
    statistics: SpikeStatistics,
    recipe: Recipe | None = None,
    before: SpikeStatistics | None = None,
    top: int = 30,
) -> Figure | None:
    """Draw the highest max-median ratios as bars, coloured by what became of the module.

    Args:
        statistics: What the precision was chosen by (with the prefix in place, when there is one).
        recipe: Gives precision and alpha; without it all bars are grey.
        before: Statistics without the prefix, marked on each bar.
        top: How many bars.
    """
    ratios = {name: ratio for name, ratio in statistics.ratios().items() if _drawable(ratio)}
    earlier = before.ratios() if before is not None else {}
    # A spike that the prefix removed is worth its bar: chosen by the higher of both, ordered by what counts.
    highest = sorted(ratios, key=lambda name: -max(ratios[name], earlier.get(name, 0.0)))[:top]
    names = [name for name in ratios if name in highest]
    if not names:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.0, 1.5 + 0.21 * len(names)), layout="constrained")
        axes = figure.subplots()
        rows = range(len(names))
        bars = axes.barh(rows, [ratios[name] for name in names], height=0.72, zorder=2)
        for bar, name in zip(bars, names, strict=True):
            colour, hatch = _bar_style(name, recipe)
            bar.set(facecolor=colour, hatch=hatch, edgecolor=INK if hatch else colour, linewidth=0.5)
        entries = _bar_legend(names, recipe)
        if earlier:
            entries.append(_mark_before(axes, names, earlier))
        if recipe is not None and recipe.alpha is not None and _drawable(recipe.alpha):
            entries.append(axes.axvline(recipe.alpha, color=INK, linestyle="--", linewidth=1.2, zorder=3))
            entries[-1].set_label(f"alpha = {recipe.alpha:.4g}")
        _label_bars(axes, names, bool(statistics.prefix_ids))
        axes.legend(handles=entries, loc="lower right", frameon=True, framealpha=1.0, fontsize=9)
        return figure


def _mark_before(axes: "Axes", names: Sequence[str], earlier: Mapping[str, float]) -> Line2D:
    marks = [(row, earlier[name]) for row, name in enumerate(names) if _drawable(earlier.get(name, math.nan))]
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
    axes.set_yticks(range(len(names)), [_short_name(name) for name in names], fontsize=8.5, parse_math=False)
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


def qfem_curve(
    curve: Sequence[CurvePoint], reference: float | None, chosen: int | None, precision: str
) -> Figure | None:
    """Draw perplexity against the number of kept linears.

    Args:
        curve: Evaluated sets.
        reference: Perplexity with nothing quantized.
        chosen: Number of linears that the recipe keeps; its point is marked when it was evaluated.
        precision: Format of the kept linears, for the labels.
    """
    points = sorted({(point.fp16_modules, point.perplexity) for point in curve if _drawable(point.perplexity)})
    if not points:
        return None
    counts, perplexities = [count for count, _ in points], [perplexity for _, perplexity in points]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(counts, perplexities, color=INT8_COLOUR, marker="o", markersize=5, zorder=3, label="the rest in INT8")
        if reference is not None and _drawable(reference):
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
        return figure


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


def svg_text(figure: Figure, name: str) -> str:
    """Return the figure as one `<svg>` element, the same bytes for the same figure.

    Args:
        figure: What to draw.
        name: Put before every id, so that several pictures can stand in one HTML page.
    """
    buffer = io.StringIO()
    # Without any metadata: the default holds the date and the library's version.
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", dpi=RASTER_DPI, metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    # The page sets the width; without these two the picture keeps its shape through the viewBox.
    return re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text))


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _layer(name: str) -> int | None:
    try:
        return split_name(name)[0]
    except ValueError:
        return None


def _short_name(name: str) -> str:
    """Return `layer 11  mlp.down_proj` for a decoder module's full name."""
    try:
        layer, module = split_name(name)
    except ValueError:
        return name
    return f"{module}  layer {layer}"
