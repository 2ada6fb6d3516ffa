"""A picture and what its marks say: as SVG with a text for the pointer on each mark, and as PNG."""

import io
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from spike_export.artifacts.files.atomic_write import atomic_path
from spike_export.report.figures.style import STYLE

RASTER_DPI = 200
"""Resolution of a heat map's cells inside the SVG; everything else stays vector."""

_MARK = "mark-"


@dataclass(frozen=True)
class Drawing:
    """A figure, and the texts of its marks, in the order in which they were told."""

    figure: Figure
    texts: list[str] = field(default_factory=list)

    def tell(self, mark: Artist, text: str) -> None:
        """Let a mark show a text where it is pointed at."""
        mark.set_gid(f"{_MARK}{len(self.texts)}")
        self.texts.append(text)


def svg_text(drawing: Drawing, name: str) -> str:
    """Return the picture as one `<svg>` element, the same bytes for the same picture.

    Args:
        drawing: What to draw.
        name: Put before every id, so that several pictures can stand in one HTML page.
    """
    buffer = io.StringIO()
    # Without any metadata: the default holds the date and the library's version.
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        drawing.figure.savefig(buffer, format="svg", dpi=RASTER_DPI, metadata=empty)
    drawing.figure.set_layout_engine("none")  # everything has its place now; finding it takes as long as drawing
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(
        rf'<g id="{_MARK}(\d+)">', lambda mark: f"{mark[0]}<title>{escape(_told(drawing, mark))}</title>", text
    )
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    # The page sets the width; without these two the picture keeps its shape through the viewBox.
    return re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text))


def _told(drawing: Drawing, mark: re.Match[str]) -> str:
    return drawing.texts[int(mark[1])]


def save_png(drawing: Drawing, path: Path, dpi: int = 150) -> None:
    """Write a picture as PNG, whole or not at all and without metadata."""
    with atomic_path(path) as temporary, matplotlib.rc_context(STYLE):
        drawing.figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
