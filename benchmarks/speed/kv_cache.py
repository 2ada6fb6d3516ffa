"""Decode with a static cache, written in place, against a dynamic one, which every call copies.

W8A8 bundles with float32 for the rest, in ONNX Runtime on this machine's CPU. At each context there are the dynamic
cache, a static one whose capacity is just enough, and the static one of the largest context's capacity twice: with its
whole buffer, and with buffers as long as the sequences need, as generation has them. Attention reads the whole buffer,
so that room nobody uses costs time. The last one is there with keys and values in INT8 too, where the recipe has steps
for them. All take turns, call by call.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fetch_models import smollm2_path
from benchmarks.peak_memory import in_own_process, peak_rss
from benchmarks.speed.kept_bundles import require_model, require_recipe
from benchmarks.speed.table import WARM_UP_CALLS, Timing, add_recipe_arguments, interleaved, open_session, quick_recipe

CONTEXTS = (16, 256, 1024)


@dataclass(frozen=True)
class Cache:
    """A cache to measure.

    Attributes:
        capacity: Of the static cache; None for the dynamic one.
        grows: Whether the buffer is as long as the sequence needs, in steps; else it is the whole capacity.
        int8: Whether it holds keys and values in INT8.
    """

    capacity: int | None = None
    grows: bool = False
    int8: bool = False

    @property
    def name(self) -> str:
        """For reading."""
        kind = f"static {self.capacity}{' in steps' if self.grows else ''}" if self.capacity else "dynamic"
        return f"{kind}, INT8" if self.int8 else kind

    @property
    def graph(self) -> "Graph":
        """The bundle that it needs."""
        return self.capacity, self.int8


Graph = tuple[int | None, bool]
"""Capacity, None standing for the dynamic cache; and whether keys and values are in INT8."""


@dataclass(frozen=True)
class Result:
    """One cache at one context.

    Attributes:
        decode: Calls of one token.
        token_bytes: Of the keys and values of a token.
        peak_rss: Bytes; of a process of its own that reads the context and decodes.
    """

    context: int
    cache: Cache
    decode: Timing
    token_bytes: int
    peak_rss: int


def main() -> int:
    """Build the bundles, measure, print; return the exit code."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="spike-export-kv-cache-") as temporary:
        folder = arguments.bundles or Path(temporary)
        before = os.getloadavg()[0]
        results = measure(arguments, folder)
    print(table(results))
    print(f"{arguments.threads} threads, load average {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(as_json(results, arguments.threads), indent=2) + "\n", encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache")
    parser.add_argument("--bundles", type=Path, help="keep the bundles here, and use again what is here")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of each session")
    parser.add_argument("--decodes", type=int, default=41, help="calls of one token per cache and context")
    parser.add_argument("--in-steps", action="store_true", help="compare the caches that grow in steps alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def caches(contexts: Sequence[int], decodes: int, *, in_steps: bool = False) -> dict[int, tuple[Cache, ...]]:
    """Return the caches to compare at each context; those that grow in steps alone, or all."""
    room = decodes + WARM_UP_CALLS
    largest = max(contexts) + room
    growing = (Cache(largest, grows=True), Cache(largest, grows=True, int8=True))
    if in_steps:
        return dict.fromkeys(contexts, growing)
    fixed = {context: (Cache(), Cache(context + room), Cache(largest)) for context in contexts}
    return {context: tuple(dict.fromkeys((*fixed[context], *growing))) for context in contexts}


def build_bundles(arguments: argparse.Namespace, folder: Path, wanted: set[Graph]) -> dict[Graph, Path]:
    """Export what is not in `folder` yet; return the bundles, without those that the recipe has no steps for.

    What is there must be of the same model and recipe; a recipe that is neither given nor needed for an export is not
    made just to compare it.
    """
    bundles = {graph: folder / _name(*graph) for graph in wanted}
    missing = [graph for graph in wanted if not (bundles[graph] / "manifest.json").is_file()]
    found = [bundle for graph, bundle in bundles.items() if graph not in missing]
    from spike_export.checkpoint.opening import open_checkpoint
    from spike_export.export.bundle import ExportOptions, export_bundle
    from spike_export.export.cache_options import CacheOptions

    checkpoint = open_checkpoint(arguments.model or str(smollm2_path()))
    require_model(found, checkpoint)
    if not missing and arguments.recipe is None:
        return bundles
    recipe = quick_recipe(checkpoint, arguments, kv_cache_dtype="int8")
    for bundle in found:
        require_recipe(bundle, recipe)
    for capacity, int8 in missing:
        if int8 and not recipe.kv_cache:
            _say(f"the recipe has no steps for keys and values: {bundles.pop((capacity, int8)).name} is left out")
            continue
        cache = CacheOptions() if capacity is None else CacheOptions("static", capacity)
        _say(f"exporting {bundles[capacity, int8].name}")
        options = ExportOptions("float32", cache=cache, kv_cache_dtype="int8" if int8 else "unquantized")
        export_bundle(checkpoint, recipe, options, bundles[capacity, int8])
    return bundles


def _name(capacity: int | None, int8: bool) -> str:
    return ("dynamic" if capacity is None else f"static-{capacity}") + ("-int8" if int8 else "")


def token_bytes(bundle: Path) -> int:
    """Return the size of the keys and values of a token in a bundle's cache."""
    import numpy as np

    from spike_export.artifacts.manifest import load_manifest

    manifest = load_manifest(bundle)
    numbers = 2 * manifest.num_hidden_layers * manifest.num_key_value_heads * manifest.head_dim
    return numbers * np.dtype(manifest.cache_type).itemsize


def measure(arguments: argparse.Namespace, folder: Path) -> list[Result]:
    """Time the caches against each other, then use each alone for its memory."""
    compared = caches(arguments.contexts, arguments.decodes, in_steps=arguments.in_steps)
    bundles = build_bundles(arguments, folder, {cache.graph for each in compared.values() for cache in each})
    results = []
    for context, wanted in compared.items():
        _say(f"measuring at {context} tokens")
        chosen = [cache for cache in wanted if cache.graph in bundles]
        decoders = {cache: Decoding(bundles[cache.graph], cache.grows, context, arguments.threads) for cache in chosen}
        timings = interleaved({cache: decoder.step for cache, decoder in decoders.items()}, arguments.decodes)
        decoders.clear()
        for cache in chosen:
            bundle = bundles[cache.graph]
            peak = in_own_process(_use_alone, bundle, cache.grows, context, arguments.threads, arguments.decodes)
            results.append(Result(context, cache, timings[cache], token_bytes(bundle), peak))
    return results


class Decoding:
    """One sequence that has read `context` tokens, and goes on by one token per step."""

    def __init__(self, bundle: Path, grows: bool, context: int, threads: int) -> None:
        import numpy as np

        from spike_export.artifacts.manifest import load_manifest
        from spike_export.engines.onnx_runtime.generation_graph import generation_graph
        from spike_export.engines.onnx_runtime.session import BundleSession

        manifest = load_manifest(bundle)
        graph = generation_graph(bundle, manifest) if grows else None
        session = open_session(bundle, threads, graph)
        self._sequences = BundleSession(manifest, session, prefix=graph.prefix if graph else None).begin(1)
        tokens = np.random.default_rng(0).integers(0, manifest.vocab_size, (1, context + 1))
        self._next = tokens[:, context:]
        self._sequences.step(tokens[:, :context])

    def step(self) -> None:
        """Decode one token."""
        self._sequences.step(self._next)


def _use_alone(bundle: Path, grows: bool, context: int, threads: int, decodes: int) -> int:
    """Return the peak resident memory of this process, which reads a context, decodes, and does nothing else."""
    decoding = Decoding(bundle, grows, context, threads)
    for _ in range(decodes):
        decoding.step()
    return peak_rss()


def ratio(results: Sequence[Result], result: Result) -> float:
    """Return how many times faster than the first cache at the same context, by medians: the dynamic one, of all."""
    first = next(other for other in results if other.context == result.context)
    return first.decode.median / result.decode.median


def table(results: Sequence[Result]) -> str:
    """Return the figures for reading."""
    memory = f"{'bytes a token':>13} {'peak RSS MB':>11}"
    lines = [f"{'context':>7} {'cache':28} | {'decode: ms':>10} {'min':>6} {'ratio':>6} | {memory}"]
    lines += [
        f"{r.context:7} {r.cache.name:28} | {r.decode.median * 1e3:10.1f} {r.decode.minimum * 1e3:6.1f}"
        f" {ratio(results, r):5.2f}x | {r.token_bytes:13,} {r.peak_rss / 1e6:11.0f}"
        for r in results
    ]
    return "\n".join(lines)


def as_json(results: Sequence[Result], threads: int) -> dict[str, Any]:
    """Return the figures for programs: seconds, bytes, and ratios of medians to the first cache."""
    rows = [
        {"context": each.context, **asdict(each.cache), "ratio": ratio(results, each)}
        | {"decode": asdict(each.decode), "token_bytes": each.token_bytes, "peak_rss": each.peak_rss}
        for each in results
    ]
    return {"threads": threads, "caches": rows}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
