"""What all pictures of a report have in common.

Every picture has a light background of its own, so that it stays legible on a dark page, and colours that colour-blind
readers tell apart (Okabe-Ito; kept modules are hatched as well).
"""

import math
from typing import Any

from spike_export.checkpoint.modules import split_name

INT8_COLOUR = "#0072B2"
KEPT_COLOUR = "#E69F00"
UNDECIDED_COLOUR = "#7F7F7F"
CHOSEN_COLOUR = "#D55E00"
INK = "#1A1A1A"
PAPER = "#FFFFFF"
GRID = "#DDDDDD"

# Any: the type stubs spell out every key of matplotlib as a literal.
STYLE: Any = {
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


def drawable(value: float) -> bool:
    """Return whether a value has a place on a logarithmic scale."""
    return math.isfinite(value) and value > 0


def layer_of(name: str) -> int | None:
    """Return the layer of a decoder module; None for a name that has none."""
    try:
        return split_name(name)[0]
    except ValueError:
        return None


def short_name(name: str) -> str:
    """Return `mlp.down_proj  layer 11` for a decoder module's full name."""
    try:
        layer, module = split_name(name)
    except ValueError:
        return name
    return f"{module}  layer {layer}"
