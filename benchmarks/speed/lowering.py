"""What ONNX Runtime's own operators bring to generation: the lowered graph beside the bundle's standard one, in turns.

Run: python -m benchmarks.speed.lowering BUNDLE [--rows 1 4 8] [--contexts 256 1024]; of a bundle with a static cache.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import open_for_generation

CHUNK = 512


@dataclass
class Measured:
    """Seconds of one graph."""

    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)


def play(bundle: Path, lowering: bool, rows: int, context: int, steps: int, threads: int, times: Measured) -> None:
    """Read a prompt of `context` tokens into each of `rows` rows, then take steps together."""
    manifest = load_manifest(bundle)
    batch = open_for_generation(bundle, threads, lowering=lowering).begin(rows)
    assert isinstance(batch, StaticSequences), "a bundle with a static cache"
    random = np.random.default_rng(0)
    for row in range(rows):
        prompt = random.integers(0, manifest.vocab_size, context)
        start = time.perf_counter()
        batch.admit(row, prompt[:CHUNK])
        for place in range(CHUNK, context, CHUNK):
            batch.extend(row, prompt[place : place + CHUNK])
        times.prefills.append(time.perf_counter() - start)
    for _ in range(steps):
        tokens = random.integers(0, manifest.vocab_size, (rows, 1))
        start = time.perf_counter()
        batch.step(tokens)
        times.decodes.append(time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="tokens of each row in a round")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    sessions = [open_for_generation(given.bundle, given.threads, lowering=each) for each in (False, True)]
    print("rows  context  prefill, ms         decode, ms          standard : lowered")
    for rows in given.rows:
        for context in given.contexts:
            standard, lowered = Measured(), Measured()
            for _ in range(given.rounds):
                for lowering, times in ((False, standard), (True, lowered)):
                    play(given.bundle, lowering, rows, context, given.steps, given.threads, times)
            pairs = [(standard.prefills, lowered.prefills), (standard.decodes, lowered.decodes)]
            (before, after), (slow, fast) = ((1e3 * median(a), 1e3 * median(b)) for a, b in pairs)
            print(
                f"{rows:4}  {context:7}  {before:8.1f} {after:8.1f}  {slow:8.2f} {fast:8.2f}   "
                f"{before / after:5.2f} x prefill, {slow / fast:5.2f} x decode",
                flush=True,
            )
    del sessions


if __name__ == "__main__":
    main()
