"""Decoding with INT8 products beside ONNX Runtime's products of INT8 weights alone (`MatMulNBits`), step by step.

The second graph is the one that `--weights-copy auto` gives single rows, also with blocks of other sizes. On a machine
that has other work, `--processor-time --threads 1` measures the processor time of the one thread.

With `--text FILE` accuracy is measured instead: windows of the text are fed token by token, and compared with those of
the float32 bundle of the same prefix (`--reference`): perplexity, and the divergence of the distributions.

Run: python -m benchmarks.speed.weight_only_products BUNDLE; of a bundle with a static cache.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.speed.lowering import Measured, gain, opened, play
from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.bundle_text import BundleText
from spike_export.engines.onnx_runtime import generation_graph
from spike_export.engines.onnx_runtime.lowering.weight_only_products import weigh_only
from spike_export.engines.onnx_runtime.session import BundleSession

WINDOW = 256


def graph_of(bundle: Path, block: int | None, level: int) -> generation_graph.GenerationGraph:
    """Return the graph with products of weights alone in blocks of a size, or with INT8 products."""
    manifest = load_manifest(bundle)
    if block is None:
        return generation_graph.generation_graph(bundle, manifest)
    with patch.object(generation_graph, "weigh_only", lambda model, values: weigh_only(model, values, block, level)):
        return generation_graph.generation_graph(bundle, manifest, weight_only=True)


def table(times: Mapping[str, Measured], rows: int) -> str:
    """Return medians and shortest steps, and how many times as fast as the first graph."""
    first = next(iter(times.values()))
    parts = (
        f"{name}: {median(each.decodes) * 1e3:.2f} ({min(each.decodes) * 1e3:.2f}) ms, {gain(first, each):.2f} x"
        for name, each in times.items()
    )
    return f"{rows:3} rows | " + " | ".join(parts)


def log_probabilities(session: BundleSession, window: NDArray[np.int64]) -> NDArray[np.float64]:
    """Feed a window's tokens one by one; return [tokens - 1, vocab] of what follows each."""
    batch = session.begin(1)
    logits = np.concatenate([batch.step(token.reshape(1, 1))[:, 0] for token in window[:-1]]).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def compare(sessions: Mapping[str, BundleSession], reference: BundleSession, windows: NDArray[np.int64]) -> None:
    """Print how far each session's perplexity and distributions are from the reference's."""
    rows = np.arange(windows.shape[1] - 1)
    costs: dict[str, list[float]] = {name: [] for name in sessions}
    divergences: dict[str, list[float]] = {name: [] for name in sessions}
    for window in windows:
        right = log_probabilities(reference, window)
        for name, session in sessions.items():
            found = log_probabilities(session, window)
            costs[name].append(float((right - found)[rows, window[1:]].mean()))
            divergences[name].append(float((np.exp(right) * (right - found)).sum(axis=1).mean()))
    for name in sessions:
        mean, spread = np.mean(costs[name]), 1.96 * np.std(costs[name], ddof=1) / len(windows) ** 0.5
        print(f"{name}: perplexity {np.expm1(mean):+.2%} +/- {spread:.2%}, KL {np.mean(divergences[name]):.4f}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="folder that export wrote with --kv-cache static")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--level", type=int, default=4, help="accuracy level of MatMulNBits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="of the calling thread, in place of the clock")
    parser.add_argument("--text", type=Path, help="measure accuracy on this text instead")
    parser.add_argument("--reference", type=Path, help="with --text: float32 bundle with a static cache")
    parser.add_argument("--windows", type=int, default=8, help=f"with --text: of {WINDOW} tokens")
    chosen = parser.parse_args(arguments)
    clock = time.thread_time if chosen.processor_time else time.perf_counter
    variants = {"INT8": None} | {f"blocks of {size}": size for size in chosen.blocks}
    sessions = {
        name: opened(chosen.bundle, graph_of(chosen.bundle, size, chosen.level), chosen.threads)
        for name, size in variants.items()
    }
    if chosen.text is not None:
        tokens = BundleText.read(chosen.bundle).tokenizer.encode(chosen.text.read_text(encoding="utf-8"))
        ids = np.array(tokens[: len(tokens) // WINDOW * WINDOW], np.int64).reshape(-1, WINDOW)
        spread = ids[np.linspace(0, len(ids) - 1, chosen.windows).astype(int)]
        reference = opened(chosen.reference, graph_of(chosen.reference, None, chosen.level), chosen.threads)
        compare(sessions, reference, spread)
        return
    for rows in chosen.rows:
        times = {name: Measured(session) for name, session in sessions.items()}
        for _ in range(chosen.rounds):
            play(list(times.values()), rows, chosen.context, chosen.steps, clock)
        print(table(times, rows), flush=True)


if __name__ == "__main__":
    main()
