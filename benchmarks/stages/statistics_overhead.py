"""What recording all statistics costs: the calibration's pass against the bare one over the same windows, on a CPU.

Both take turns, so that whatever else the machine does hits them alike and the ratio holds.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fetch_models import smollm2_path

TARGET = 1.10
"""Largest ratio of medians."""


@dataclass(frozen=True)
class Overhead:
    """Seconds of each round's two passes, in the rounds' order."""

    bare: Sequence[float]
    recorded: Sequence[float]

    @property
    def of_medians(self) -> float:
        """Ratio of the median passes: what is to be expected."""
        return statistics.median(self.recorded) / statistics.median(self.bare)

    @property
    def of_minima(self) -> float:
        """Ratio of the fastest passes: what is left when nothing else runs."""
        return min(self.recorded) / min(self.bare)


def main() -> int:
    arguments = _arguments()
    before = os.getloadavg()[0]
    overhead, threads = measure(arguments)
    print(table(overhead))
    print(f"{threads} threads, load average {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    if arguments.json is not None:
        document = {"threads": threads, "load_average": before, **as_json(overhead)}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--windows", type=int, default=2, help="windows of random tokens per pass")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--batch-tokens", type=int, default=1, help="tokens per forward call; 1: one window each")
    parser.add_argument("--rounds", type=int, default=11, help="passes of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the tokens")
    parser.add_argument("--threads", type=int, help="torch's intra-op threads; as many as cores by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> tuple[Overhead, int]:
    """Time the passes over random windows, the layers resident; also return the number of threads."""
    import numpy as np
    import torch

    from spike_export.calibration.decoder.layerwise import Decoder
    from spike_export.calibration.methods.context import PEAK_STRIDE
    from spike_export.calibration.statistics.measure import measure_spikes
    from spike_export.checkpoint.opening import open_checkpoint

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    decoder = Decoder(open_checkpoint(arguments.model or str(smollm2_path())))
    shape = (arguments.windows, arguments.length)
    windows = np.random.default_rng(arguments.seed).integers(0, decoder.config.vocab_size, shape)
    overhead = in_turns(
        lambda: decoder.run(windows, batch_tokens=arguments.batch_tokens),
        lambda: measure_spikes(decoder, windows, batch_tokens=arguments.batch_tokens, peak_stride=PEAK_STRIDE),
        arguments.rounds,
    )
    return overhead, torch.get_num_threads()


def in_turns(bare: Callable[[], object], recorded: Callable[[], object], rounds: int) -> Overhead:
    """Time `rounds` passes of each, after one that reads the weights; every second round begins with the other."""
    passes = (bare, recorded)
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in passes:
        run()
    for turn in range(rounds):
        for kind in (0, 1) if turn % 2 == 0 else (1, 0):
            start = time.perf_counter()
            passes[kind]()
            seconds[kind].append(time.perf_counter() - start)
    return Overhead(*seconds)


def table(overhead: Overhead) -> str:
    """Return the figures for reading."""
    bare, recorded = overhead.bare, overhead.recorded
    verdict = "met" if overhead.of_medians <= TARGET else "missed"
    return "\n".join(
        (
            f"{'pass':10} {'median s':>9} {'min s':>9}",
            f"{'bare':10} {statistics.median(bare):9.3f} {min(bare):9.3f}",
            f"{'recorded':10} {statistics.median(recorded):9.3f} {min(recorded):9.3f}",
            f"{'ratio':10} {overhead.of_medians:9.3f} {overhead.of_minima:9.3f}",
            f"target: a ratio of medians of at most {TARGET:.2f} {verdict}",
        )
    )


def as_json(overhead: Overhead) -> dict[str, Any]:
    """Return the figures for programs."""
    return {
        "bare_seconds": list(overhead.bare),
        "recorded_seconds": list(overhead.recorded),
        "ratio_of_medians": overhead.of_medians,
        "ratio_of_minima": overhead.of_minima,
        "target": TARGET,
    }


if __name__ == "__main__":
    sys.exit(main())
