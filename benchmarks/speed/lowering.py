"""What lowering brings to generation: the standard graph, ONNX Runtime's own attention, packed products as well, and
then scores of queries that bring their scale, in the kernels that keep them, and at last residuals fused with norms.

The five take each step in turns; ratios are medians of steps with the same tokens. `--ragged` lets rows have half of
the context to all of it. On a machine that has other work, `--processor-time --threads 1` measures the processor time
of the one thread.

Run: python -m benchmarks.speed.lowering BUNDLE [--rows 1 4 8] [--contexts 256 1024]; of a bundle with a static cache.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime import generation_graph
from spike_export.engines.onnx_runtime.attention_kernels import scores_in_rows
from spike_export.engines.onnx_runtime.generation_graph import GenerationGraph
from spike_export.engines.onnx_runtime.lowering import packed_products
from spike_export.engines.onnx_runtime.prefill_chunk import LARGEST
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession, name_weights, session_options


@dataclass(frozen=True)
class Variant:
    """What of lowering a graph has.

    Attributes:
        attention: ONNX Runtime's own.
        packs: Products of one tensor are one.
        scores: Queries bring the scale, and the kernels keep scores.
        norms: Residuals and norms are fused.
    """

    attention: bool = True
    packs: bool = True
    scores: bool = True
    norms: bool = True


VARIANTS = {
    "standard": Variant(attention=False, packs=False, scores=False, norms=False),
    "attention": Variant(packs=False, scores=False, norms=False),
    "packed": Variant(scores=False, norms=False),
    "scores": Variant(norms=False),
    "norms": Variant(),
}

Clock = Callable[[], float]


@dataclass
class Measured:
    """Seconds of one graph."""

    session: BundleSession
    prefills: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)


def graph_of(bundle: Path, variant: Variant) -> GenerationGraph:
    """Return one of the graphs; the engine itself knows the first and the last."""
    with ExitStack() as changes:
        if not variant.packs:
            changes.enter_context(patch.object(packed_products, "LARGEST_COPY", 0))
        if not variant.scores:
            changes.enter_context(patch.object(generation_graph, "scale_queries", lambda *_: {}))
        if not variant.norms:
            changes.enter_context(patch.object(generation_graph, "fuse_residual_norms", lambda _: None))
        return generation_graph.generation_graph(bundle, load_manifest(bundle), lowering=variant.attention)


def opened(bundle: Path, graph: GenerationGraph, threads: int, *, scores: bool = True) -> BundleSession:
    """Open a graph over the bundle's weights and its own; `scores` is a variant's."""
    import onnxruntime as ort

    options = session_options(threads)
    name_weights(options, bundle, graph.weights)
    with scores_in_rows() if scores else nullcontext():
        session = ort.InferenceSession(graph.serialized, options, providers=["CPUExecutionProvider"])
    return BundleSession(load_manifest(bundle), session, "cpu", graph.prefix)


def play(
    measured: Sequence[Measured], rows: int, context: int, steps: int, clock: Clock, *, ragged: bool = False
) -> None:
    """Read a prompt of `context` tokens into each of `rows` rows, then take steps together: the sessions in turns.

    Every other time the last session is the first. Ragged rows have half of the context to all of it.
    """
    batches = [(each, each.session.begin(rows)) for each in measured]
    random, vocab = np.random.default_rng(0), measured[0].session.manifest.vocab_size
    for row, length in enumerate(np.linspace(context / 2, context, rows).astype(int) if ragged else [context] * rows):
        prompt = random.integers(0, vocab, length)
        for times, batch in batches[:: 1 - row % 2 * 2]:
            assert isinstance(batch, StaticSequences), "a bundle with a static cache"
            start = clock()
            batch.admit(row, prompt[:LARGEST])
            for place in range(LARGEST, length, LARGEST):
                batch.extend(row, prompt[place : place + LARGEST])
            times.prefills.append(clock() - start)
    for step in range(steps):
        tokens = random.integers(0, vocab, (rows, 1))
        for times, batch in batches[:: 1 - step % 2 * 2]:
            start = clock()
            batch.step(tokens)
            times.decodes.append(clock() - start)


def gain(first: Measured, other: Measured) -> float:
    """Return how many times as fast the other one decodes: the median of the ratios of steps with the same tokens."""
    return median(slow / fast for slow, fast in zip(first.decodes, other.decodes, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="tokens of each row in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ragged", action="store_true", help="rows of different lengths")
    parser.add_argument("--processor-time", action="store_true", help="of the calling thread, in place of the clock")
    given = parser.parse_args(arguments)
    clock = time.thread_time if given.processor_time else time.perf_counter
    sessions = {
        name: opened(given.bundle, graph_of(given.bundle, variant), given.threads, scores=variant.scores)
        for name, variant in VARIANTS.items()
    }
    print("rows | context | " + " | ".join(f"{name}: prefill, decode, ms" for name in sessions))
    for rows in given.rows:
        for context in given.contexts:
            measured = [Measured(session) for session in sessions.values()]
            for _ in range(given.rounds):
                play(measured, rows, context, given.steps, clock, ragged=given.ragged)
            columns = [f"{median(t.prefills) * 1e3:.1f}, {median(t.decodes) * 1e3:.2f}" for t in measured]
            ratios = [f"{gain(measured[0], times):.2f} x" for times in measured[1:]]
            print(f"{rows:4} | {context:7} | {' | '.join(columns)} | decode {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
