"""Tokens per second of whole batches: bundles of one model side by side, in turns, at several numbers of rows.

Rows have half to one and a half times as many tokens in front as `--context` says, as sequences of a server have. A
round reads the prompts row by row, and then decodes all rows together. The first bundle is what others are compared to.

Run: python -m benchmarks.speed.batches FP32_BUNDLE BUNDLE [MORE ...]; of bundles with a static cache.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession, open_for_generation


@dataclass
class Rates:
    """Tokens per second of one bundle at one number of rows, one of each round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def lengths(rows: int, context: int) -> list[int]:
    """Return tokens in front of each row: half to one and a half times the context, evenly."""
    return [round(context * share) for share in np.linspace(0.5, 1.5, rows)] if rows > 1 else [context]


def play(session: BundleSession, rows: int, context: int, steps: int, rates: Rates) -> None:
    """Read a prompt into each row, then decode all of them together; the first step is not counted."""
    batch = session.begin(rows)
    assert isinstance(batch, StaticSequences), "a bundle with a static cache"
    random, vocab = np.random.default_rng(0), session.manifest.vocab_size
    prompts = [random.integers(0, vocab, length) for length in lengths(rows, context)]
    start = time.perf_counter()
    for row, prompt in enumerate(prompts):
        batch.admit(row, prompt)
    rates.prefill.append(sum(map(len, prompts)) / (time.perf_counter() - start))
    tokens = random.integers(0, vocab, (steps + 1, rows, 1))
    batch.step(tokens[0])
    start = time.perf_counter()
    for step in tokens[1:]:
        batch.step(step)
    rates.decode.append(rows * steps / (time.perf_counter() - start))


def spread(values: Sequence[float]) -> str:
    """Return the median, and the range behind it."""
    return f"{median(values):7.1f} ({min(values):.0f} to {max(values):.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="+", help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="tokens of each row in a round")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    sessions = [open_for_generation(path, given.threads) for path in given.bundle]
    print("rows | bundle | decode, tokens/s | x | prefill, tokens/s | x")
    for rows in given.rows:
        measured = [Rates() for _ in sessions]
        for _ in range(given.rounds):
            for session, rates in zip(sessions, measured, strict=True):
                play(session, rows, given.context, given.steps, rates)
        for path, rates in zip(given.bundle, measured, strict=True):
            decode, prefill = (
                median(getattr(rates, kind)) / median(getattr(measured[0], kind)) for kind in ("decode", "prefill")
            )
            print(
                f"{rows:4} | {path.name} | {spread(rates.decode)} | {decode:.2f} | {spread(rates.prefill)} | "
                f"{prefill:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
