"""Draws the README's picture from a run's statistics: python -m benchmarks.spike_picture RUN docs/spikes.png."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from spike_export.artifacts.atomic_write import atomic_path
from spike_export.calibration.statistics.spikes import load_spikes
from spike_export.report.figures import spike_picture


def save_png(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a figure as PNG, whole or not at all and without metadata."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def main() -> None:
    run, picture = Path(sys.argv[1]), Path(sys.argv[2])
    figure = spike_picture(load_spikes(run / "spikes"), load_spikes(run / "spikes_prefixed"))
    if figure is None:
        sys.exit(f"{run}: nothing to draw")
    save_png(figure, picture)


if __name__ == "__main__":
    main()
