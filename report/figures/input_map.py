"""Which inputs the error comes from, as a heat map: what reads the input, by layer."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from spike_export.checkpoint.modules import siblings
from spike_export.report.figures.drawing import Drawing
from spike_export.report.figures.style import STYLE, layer_of


def input_map(shares: Mapping[str, float], label: str) -> Drawing | None:
    """Draw the share of each input.

    Args:
        shares: Representative module → share of the whole, 0 to 1; an expert adds to those of its layer.
        label: What is shared.
    """
    table = input_table(shares)
    if not table:
        return None
    layers = sorted({layer for row in table.values() for layer in row})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 1.5 + 0.36 * len(table)), layout="constrained")
        axes, drawing = figure.subplots(), Drawing(figure)
        values = np.array([[row.get(layer, 0.0) for layer in layers] for row in table.values()])
        colours = matplotlib.colormaps["viridis"]
        largest = float(values.max()) or 1.0
        for number, (readers, row) in enumerate(table.items()):
            for column, layer in enumerate(layers):
                share = row.get(layer, 0.0)
                cell = Rectangle((column - 0.5, number - 0.5), 1.0, 1.0, facecolor=colours(share / largest))
                axes.add_patch(cell)
                drawing.tell(cell, f"layer {layer}, {readers}: {share:.2%} of the {label}")
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.set_yticks(range(len(table)), [f"{name}  {sum(row.values()):.0%}" for name, row in table.items()])
        step = max(1, len(layers) // 16)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_xlabel("decoder layer")
        axes.tick_params(length=0)
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0.0, 100 * largest), colours)
        figure.colorbar(scale, ax=axes, pad=0.015, aspect=12).set_label("share in %")
        return drawing


def input_table(shares: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Return what reads an input → layer → share, the largest sum first."""
    table: dict[str, dict[int, float]] = {}
    for name, share in shares.items():
        layer = layer_of(name)
        if layer is not None:
            row = table.setdefault(_readers(name), {})
            row[layer] = row.get(layer, 0.0) + share
    return dict(sorted(table.items(), key=lambda item: -sum(item[1].values())))


def _readers(name: str) -> str:
    """Return the linears that read an input, such as `q, k, v`."""
    return ", ".join(reader.rpartition(".")[2].removesuffix("_proj") for reader in siblings(name))
