"""Activation spikes as a heat map, layer by token position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.modules import is_down_projection
from spike_export.report.figures.drawing import Drawing
from spike_export.report.figures.style import STYLE, layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SINGLE_POSITIONS = 64
"""Positions drawn one cell each; spikes sit at the first tokens."""

CELLS_PER_OCTAVE = 16
"""Cells for each doubling of the position after that."""

STANDS_OUT = 10.0
"""How many times its layer's median a cell has to be, to tell its value."""

TOLD_CELLS = 150
"""Most cells of a panel that tell their value because they stand out: each takes about 400 bytes of the page."""


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
        layer = layer_of(name)
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


def spike_picture(before: SpikeStatistics, after: SpikeStatistics | None = None) -> Drawing | None:
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
    with matplotlib.rc_context(STYLE):
        rows = max(len(picture.layers) for _, picture in maps)
        figure = Figure(figsize=(10.0, min(7.5, 1.9 + 0.085 * max(rows, 14))), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
        norm = _shared_norm([picture.amax for _, picture in maps])
        drawing = Drawing(figure)
        for panel, (title, picture) in zip(axes, maps, strict=True):
            _draw_map(panel, picture, norm)
            _tell_peaks(drawing, panel, picture)
            panel.set_title(title, fontsize=11)
        axes[0].set_ylabel("decoder layer")
        colours = figure.colorbar(axes[0].collections[0], ax=list(axes), pad=0.015, aspect=30)
        colours.set_label("largest |activation| of the token (log scale)")
        return drawing


def _tell_peaks(drawing: Drawing, axes: "Axes", picture: SpikeMap) -> None:
    """Let the cells that stand out, and each layer's largest one, show their values."""
    amax = np.nan_to_num(picture.amax)  # NaN stands where no token was
    outstanding = amax / np.median(amax, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)
    order = np.argsort(-outstanding, axis=None, kind="stable")[:TOLD_CELLS]
    cells = {(int(cell) // amax.shape[1], int(cell) % amax.shape[1]) for cell in order}
    cells = {(row, column) for row, column in cells if outstanding[row, column] >= STANDS_OUT}
    cells |= {(row, int(column)) for row, column in enumerate(amax.argmax(axis=1))}
    left, right = _stretched(picture.edges[:-1]), _stretched(picture.edges[1:])
    for row, column in sorted(cells):
        place = (left[column], row - 0.5)
        # Opaque to the pointer, and not to the eye.
        cell = axes.add_patch(Rectangle(place, right[column] - left[column], 1.0, facecolor="white", alpha=0.0))
        first, last = int(picture.edges[column]), int(picture.edges[column + 1]) - 1
        where = f"position {first}" if first == last else f"positions {first} to {last}"
        drawing.tell(cell, f"layer {picture.layers[row]}, {where}: {amax[row, column]:.4g}")


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
