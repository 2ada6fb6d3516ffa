"""What lowering brings to generation: the standard graph, ONNX Runtime's own attention, and packed products as well.

The three run in turns. On a machine that has other work, `--processor-time --threads 1` measures the processor time of
the one thread.

Run: python -m benchmarks.speed.lowering BUNDLE [--rows 1 4 8] [--contexts 256 1024]; of a bundle with a static cache.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime.generation_graph import GenerationGraph, generation_graph
from spike_export.engines.onnx_runtime.lowering import packed_products
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession, name_weights, session_options

CHUNK = 512

LARGEST_COPY = {"standard": 0, "attention": 0, "packed": packed_products.LARGEST_COPY}
"""Graph → bytes of products that it may pack."""

Clock = Callable[[], float]


@dataclass
class Measured:
    """Seconds of one graph."""

    session: BundleSession
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)


def graph_of(bundle: Path, name: str) -> GenerationGraph:
    """Return one of the graphs; the engine itself knows the first and the last."""
    with patch.object(packed_products, "LARGEST_COPY", LARGEST_COPY[name]):
        return generation_graph(bundle, load_manifest(bundle), lowering=name != "standard")


def opened(bundle: Path, graph: GenerationGraph, threads: int) -> BundleSession:
    """Open a graph over the bundle's weights and its own."""
    import onnxruntime as ort

    options = session_options(threads)
    name_weights(options, bundle, graph.weights)
    session = ort.InferenceSession(graph.serialized, options, providers=["CPUExecutionProvider"])
    return BundleSession(load_manifest(bundle), session, "cpu", graph.prefix)


def play(times: Measured, rows: int, context: int, steps: int, clock: Clock) -> None:
    """Read a prompt of `context` tokens into each of `rows` rows, then take steps together."""
    batch = times.session.begin(rows)
    assert isinstance(batch, StaticSequences), "a bundle with a static cache"
    random, vocab = np.random.default_rng(0), times.session.manifest.vocab_size
    for row in range(rows):
        prompt = random.integers(0, vocab, context)
        start = clock()
        batch.admit(row, prompt[:CHUNK])
        for place in range(CHUNK, context, CHUNK):
            batch.extend(row, prompt[place : place + CHUNK])
        times.prefills.append(clock() - start)
    for _ in range(steps):
        tokens = random.integers(0, vocab, (rows, 1))
        start = clock()
        batch.step(tokens)
        times.decodes.append(clock() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="tokens of each row in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="of the calling thread, in place of the clock")
    given = parser.parse_args(arguments)
    clock = time.thread_time if given.processor_time else time.perf_counter
    sessions = {name: opened(given.bundle, graph_of(given.bundle, name), given.threads) for name in LARGEST_COPY}
    print("rows | context | " + " | ".join(f"{name}: prefill, decode, ms" for name in sessions))
    for rows in given.rows:
        for context in given.contexts:
            measured = [Measured(session) for session in sessions.values()]
            for _ in range(given.rounds):
                for times in measured:
                    play(times, rows, context, given.steps, clock)
            columns = [f"{median(t.prefills) * 1e3:.1f}, {median(t.decodes) * 1e3:.2f}" for t in measured]
            first = measured[0]
            ratios = [f"{median(first.decodes) / median(times.decodes):.2f} x" for times in measured[1:]]
            print(f"{rows:4} | {context:7} | {' | '.join(columns)} | decode {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
