"""Draws the README's picture from a run's statistics: python -m benchmarks.spike_picture RUN docs/spikes.png."""

import sys
from pathlib import Path

from spike_export.calibration.statistics.spikes import load_spikes
from spike_export.report.figures.drawing import save_png
from spike_export.report.figures.spike_map import spike_picture


def main() -> None:
    run, picture = Path(sys.argv[1]), Path(sys.argv[2])
    drawing = spike_picture(load_spikes(run / "spikes"), load_spikes(run / "spikes_prefixed"))
    if drawing is None:
        sys.exit(f"{run}: nothing to draw")
    save_png(drawing, picture)


if __name__ == "__main__":
    main()
