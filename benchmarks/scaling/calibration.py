"""How long the calibration of a large model takes over N workers, from measured seconds of one layer.

A pass over the windows costs layers x windows x seconds of a layer, the seconds in proportion to the layer's weights.
The passes that measure activations are spread over the workers of `calibrate --ray`; the searches of prefix, smoothing
and modules, which are spread too, are counted on one machine (their cost in passes: docs/benchmarks.md, cost of the
search).
Run: python -m benchmarks.scaling.calibration [--layers N] [--parameters B] [--windows N] [--workers N ...]
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

LAYER_SECONDS = 3.3
"""One layer, one window of 512 tokens, one thread on a busy machine: a LLaMA of 7B shape (docs/benchmarks.md)."""

LAYER_PARAMETERS = 6.74e9 / 32

MEASURING_PASSES = 3
"""Without prefix, behind the prefix, and after smoothing."""

SEARCH_PASSES, SEARCH_WINDOWS = 7.2 + 2.6 + 1.4, 16
"""Prefix, smoothing and modules, in passes over so many windows; the search's windows do not grow with the corpus."""


@dataclass(frozen=True)
class Calibration:
    """A model and its windows; times in seconds of one thread."""

    layers: int
    parameters: float
    windows: int

    @property
    def window(self) -> float:
        """One window through all layers."""
        return self.layers * LAYER_SECONDS * (self.parameters / self.layers) / LAYER_PARAMETERS

    def spread(self, workers: int) -> float:
        """What the workers measure, the windows in equal shares."""
        return MEASURING_PASSES * -(-self.windows // workers) * self.window

    @property
    def search(self) -> float:
        """What one machine searches."""
        return SEARCH_PASSES * SEARCH_WINDOWS * self.window

    def seconds(self, workers: int, threads_of_search: int) -> float:
        """Return the whole time.

        Args:
            workers: Each with one thread.
            threads_of_search: Of the machine that searches; products are taken to scale with them.
        """
        return self.spread(workers) + self.search / threads_of_search


def rows(calibration: Calibration, workers: Sequence[int], threads: int) -> list[str]:
    """Return the table: workers, hours of the measurement, of the search, of both."""
    search = calibration.search / threads / 3600
    return [
        f"{count:6} workers: measuring {calibration.spread(count) / 3600:8.1f} h, search {search:6.1f} h, "
        f"together {calibration.seconds(count, threads) / 3600:8.1f} h"
        for count in workers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--parameters", type=float, default=70e9, help="of all layers")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--threads", type=int, default=64, help="of the machine that searches")
    options = parser.parse_args()
    calibration = Calibration(options.layers, options.parameters, options.windows)
    print(*rows(calibration, options.workers, options.threads), sep="\n")


if __name__ == "__main__":
    main()
