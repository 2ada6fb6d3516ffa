"""Speed of the W8A8 bundle against the unquantized one in ONNX Runtime on this machine's CPU.

All sessions take turns, call by call, so that whatever else the machine does hits them alike and the ratios hold. With
--peers other tools' models of the same checkpoint take their turns too; one that cannot be built here is left out, and
the output says why.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.fetch_models import smollm2_path
from benchmarks.peak_memory import in_own_process, peak_rss
from benchmarks.speed.kept_bundles import require_model, require_recipe
from benchmarks.speed.peers import PEERS, Call, Peer, Sequences, Sources, UnavailableError, failures_told

if TYPE_CHECKING:
    import onnxruntime as ort

    from spike_export.artifacts.manifest import LogitsScope, Manifest
    from spike_export.artifacts.recipe import Dtype, HeadScheme, KvCacheDtype, Recipe
    from spike_export.checkpoint.checkpoint import Checkpoint
    from spike_export.engines.onnx_runtime.generation_graph import GenerationGraph

PREFILL_TOKENS = 256
PREFILL_TARGET, DECODE_TARGET = 2.5, 2.0
"""Times faster than the unquantized float32 bundle that gives the same logits."""

WARM_UP_CALLS = 2

PAUSE_SECONDS = 0.01
"""Between calls: threads of torch spin for some milliseconds after theirs, on the cores of whoever is next."""

_PAST = "past_key_values."

Key = TypeVar("Key")


@dataclass(frozen=True)
class Variant:
    """A bundle to measure; without `quantized` all linears, and the head, stay in `dtype`."""

    name: str
    quantized: bool
    dtype: "Dtype"
    head: "HeadScheme" = "unquantized"
    logits: "LogitsScope" = "all"
    capacity: int | None = None
    """Of a static cache, written in place; None for the cache that grows."""
    per_token: str | None = None
    """End of the names of the linears whose tokens have each a scale of their own."""
    hadamard: bool = False
    """Whether `down_proj`'s inputs pass a Hadamard transform; its steps are then not those of a calibration."""


Leg = Variant | Peer

CAPACITY = PREFILL_TOKENS + 64
"""Of the static caches: a bucket in which the measured sequence has some room to grow."""

BASELINE = Variant("float32", False, "float32")
LAST_BASELINE = Variant("float32, last", False, "float32", logits="last")
BASELINES = (BASELINE, LAST_BASELINE)
FASTEST = Variant("W8A8, last, int8 head", True, "float32", "int8-per-token-dynamic", "last")
VARIANTS = (
    BASELINE,
    LAST_BASELINE,
    Variant("W8A8", True, "float32"),
    Variant("W8A8, down_proj per token", True, "float32", per_token="down_proj"),
    Variant("W8A8, Hadamard", True, "float32", hadamard=True),
    Variant("W8A8, Hadamard, down_proj per token", True, "float32", per_token="down_proj", hadamard=True),
    Variant("W8A8, last", True, "float32", logits="last"),
    Variant("W8A8, int8-weights head", True, "float32", "int8-weights"),
    Variant("W8A8, int8 head", True, "float32", "int8-per-token-dynamic"),
    Variant("W8A8, last, int8-weights head", True, "float32", "int8-weights", "last"),
    FASTEST,
    Variant("W8A8, static, last, int8 head", True, "float32", "int8-per-token-dynamic", "last", CAPACITY),
    Variant("W8A8 float16", True, "float16"),
    Variant("W8A8 float16, last, int8 head", True, "float16", "int8-per-token-dynamic", "last"),
    Variant("W8A8 float16, static, last, int8 head", True, "float16", "int8-per-token-dynamic", "last", CAPACITY),
)


@dataclass(frozen=True)
class Timing:
    """Durations of one kind of call, in seconds."""

    median: float
    minimum: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Summarize durations in seconds."""
        return cls(statistics.median(seconds), min(seconds), len(seconds))


@dataclass(frozen=True)
class Result:
    """What was measured of one leg.

    Attributes:
        logits: Of which tokens it gives logits.
        int8_linears: Of our bundles; 0 for other tools' models, of which only their own tools know.
        bundle_bytes: Size of the weights on disk; torch reads float32 and rounds it.
        peak_rss: Bytes; of a process of its own that loads the bundle, reads a prompt and decodes.
    """

    name: str
    logits: "LogitsScope"
    int8_linears: int
    prefix_length: int
    prefill: Timing
    decode: Timing
    bundle_bytes: int
    peak_rss: int
    peer: bool = False


@dataclass(frozen=True)
class Skipped:
    """A leg that did not run, and why."""

    name: str
    reason: str


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="spike-export-speed-") as temporary:
        folder = arguments.bundles or Path(temporary)
        folders = build_bundles(arguments, folder)
        peers, skipped = build_peers(arguments, folders[BASELINE], folder)
        before = os.getloadavg()[0]
        results, failed = measure(folders, peers, arguments)
    skipped += failed
    print(table(results))
    for each in skipped:
        print(f"left out: {each.name}: {each.reason}")
    clock = "CPU time" if arguments.cpu_time else "wall time"
    print(f"{clock}, {arguments.threads} threads, load average {before:.1f} before and {os.getloadavg()[0]:.1f} after")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps(as_json(results, arguments.threads, arguments.cpu_time, skipped), indent=2) + "\n",
            encoding="utf-8",
        )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--bundles", type=Path, help="keep the bundles here, and use again what is here")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of each session")
    parser.add_argument("--peers", action="store_true", help="time other tools' models too; those with --bundles stay")
    names = (*(variant.name for variant in VARIANTS), *(peer.name for peer in PEERS))
    parser.add_argument(
        "--legs", nargs="+", metavar="NAME", choices=names, help="time these only, beside the float32 bundles"
    )
    parser.add_argument("--prefills", type=int, default=11, help="calls of 256 tokens per session")
    parser.add_argument("--decodes", type=int, default=41, help="calls of one token per session")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's CPU time: for a busy machine, with --threads 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser.parse_args()


def build_bundles(arguments: argparse.Namespace, folder: Path) -> dict[Variant, Path]:
    """Export the variants that are not in `folder` yet; those that are must be of the same model and recipe.

    A recipe that is neither given nor needed for an export is not made just to compare it.
    """
    variants = [each for each in VARIANTS if each in BASELINES or _wanted(each.name, arguments)]
    bundles = {variant: folder / variant.name.replace(",", "").replace(" ", "-").lower() for variant in variants}
    missing = [variant for variant in variants if not (bundles[variant] / "manifest.json").is_file()]
    found = {variant: bundle for variant, bundle in bundles.items() if variant not in missing}
    from spike_export.checkpoint.opening import open_checkpoint
    from spike_export.export.bundle import ExportOptions, export_bundle
    from spike_export.export.cache_options import CacheOptions

    checkpoint = open_checkpoint(arguments.model or str(smollm2_path()))
    require_model(found.values(), checkpoint)
    recipe = None
    if arguments.recipe is not None or any(variant.quantized for variant in missing):
        recipe = quick_recipe(checkpoint, arguments)
        for variant in found:
            if variant.quantized:
                require_recipe(bundles[variant], _recipe_of(variant, recipe, checkpoint.config.inner_size))
    for variant in missing:
        _say(f"exporting {variant.name}")
        plan = None
        if recipe is not None and variant.quantized:
            plan = _recipe_of(variant, recipe, checkpoint.config.inner_size)
        cache = CacheOptions() if variant.capacity is None else CacheOptions("static", variant.capacity)
        options = ExportOptions(variant.dtype, logits=variant.logits, cache=cache)
        export_bundle(checkpoint, plan, options, bundles[variant])
    return bundles


def _wanted(name: str, arguments: argparse.Namespace) -> bool:
    return not arguments.legs or name in arguments.legs


def build_peers(arguments: argparse.Namespace, float32: Path, folder: Path) -> tuple[dict[Peer, Path], list[Skipped]]:
    """Build the peers that are not in `folder` yet; return each with its artefact, and those that cannot be built."""
    from spike_export.artifacts.manifest import load_manifest
    from spike_export.checkpoint.opening import open_checkpoint

    place = folder / "peers" / load_manifest(float32).model.checkpoint_sha256[:12]  # never those of another model
    sources = Sources(lambda: open_checkpoint(arguments.model or str(smollm2_path())), float32, place)
    built, skipped = {}, []
    for peer in PEERS:
        if not arguments.peers or not _wanted(peer.name, arguments):
            continue
        _say(f"building {peer.name}")
        try:
            built[peer] = peer.built(sources)
        except UnavailableError as error:
            skipped.append(Skipped(peer.name, str(error)))
    return built, skipped


def _recipe_of(variant: Variant, recipe: "Recipe", channels: int) -> "Recipe":
    """Return the recipe with the variant's head, transform of `down_proj`'s `channels`, and scales per token."""
    from spike_export.calibration.decoder.equivalent.hadamard import hadamard_plan

    scheme = recipe.scheme.model_copy(update={"head": variant.head})
    recipe = recipe.model_copy(update={"hadamard": hadamard_plan(channels) if variant.hadamard else None})
    if variant.per_token is None:
        return recipe.model_copy(update={"scheme": scheme})
    own = {"activations": "per-token"}
    modules = {
        name: plan.model_copy(update=own) if name.endswith(variant.per_token) else plan
        for name, plan in recipe.modules.items()
    }
    return recipe.model_copy(update={"scheme": scheme, "modules": modules})


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, and what `quick_recipe` reads."""
    parser.add_argument("model", nargs="?", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--recipe", type=Path, help="quantize by this recipe instead of a quick calibration")
    parser.add_argument("--samples", type=int, default=8, help="windows of the quick calibration")
    parser.add_argument("--kept", type=int, default=0, help="linears the quick calibration keeps in 16 bit")


def quick_recipe(
    checkpoint: "Checkpoint", arguments: argparse.Namespace, kv_cache_dtype: "KvCacheDtype" = "unquantized"
) -> "Recipe":
    """Return the recipe given, or a quick one: the prefix [BOS] where there is a BOS, static per-tensor scales."""
    from spike_export.artifacts.recipe import load_recipe
    from spike_export.calibration.corpus.corpus import default_corpus
    from spike_export.calibration.corpus.token_windows import token_windows
    from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration
    from spike_export.calibration.methods.module_choice import choose_kept
    from spike_export.calibration.methods.options import CalibrationOptions
    from spike_export.calibration.recipe_writer import build_recipe

    if arguments.recipe is not None:
        return load_recipe(arguments.recipe)
    _say(f"calibrating on {arguments.samples} windows")
    options = CalibrationOptions(
        samples=arguments.samples,
        dtype="float32",
        activations="static",
        kv_cache_dtype=kv_cache_dtype,
        max_fp16_modules=arguments.kept,
    )
    corpus = default_corpus()
    windows = token_windows(corpus, checkpoint.tokenizer, options.samples, options.length - 1, options.seed)
    calibration = Calibration(checkpoint, windows, options)
    bos = checkpoint.bos_token_id
    spikes = calibration.measure(() if bos is None else (bos,))
    return build_recipe(calibration, corpus, spikes, choose_kept(calibration, spikes, NO_TRANSFORM))


def measure(
    bundles: dict[Variant, Path], peers: dict[Peer, Path], arguments: argparse.Namespace
) -> tuple[list[Result], list[Skipped]]:
    """Time all legs against each other, then load each alone for its memory."""
    from spike_export.artifacts.manifest import load_manifest

    manifests = {variant: load_manifest(folder) for variant, folder in bundles.items()}
    calls: dict[Leg, tuple[Call, Call]] = {}
    for variant, folder in bundles.items():
        calls[variant] = _session_calls(open_session(folder, arguments.threads), manifests[variant])
    sequences, skipped = Sequences(PREFILL_TOKENS, manifests[BASELINE].vocab_size), []
    for peer, folder in peers.items():
        _say(f"opening {peer.name}")
        try:
            with failures_told():
                opened = _peer_calls(peer, folder, sequences, arguments.threads, manifests[BASELINE])
                for call in opened:  # what cannot run shows here, before anything is timed
                    call()
            calls[peer] = opened
        except UnavailableError as error:
            skipped.append(Skipped(peer.name, str(error)))
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    _say("measuring prefill")
    prefill = interleaved({leg: each[0] for leg, each in calls.items()}, arguments.prefills, clock)
    _say("measuring decode")
    decode = interleaved({leg: each[1] for leg, each in calls.items()}, arguments.decodes, clock)
    legs = list(calls)
    calls.clear()
    results = []
    for leg in legs:
        _say(f"loading {leg.name} alone")
        if isinstance(leg, Peer):
            try:
                with failures_told():
                    memory = in_own_process(_use_peer_alone, leg.name, peers[leg], bundles[BASELINE], arguments.threads)
            except UnavailableError as error:
                skipped.append(Skipped(leg.name, str(error)))
                continue
            size = _data_bytes(peers[leg])
            results.append(Result(leg.name, leg.logits, 0, 0, prefill[leg], decode[leg], size, memory, peer=True))
            continue
        manifest, share = manifests[leg], manifests[leg].linears.get("int8")
        results.append(
            Result(
                name=leg.name,
                logits=leg.logits,
                int8_linears=0 if share is None else share.modules,
                prefix_length=0 if manifest.prefix is None else manifest.prefix.length,
                prefill=prefill[leg],
                decode=decode[leg],
                bundle_bytes=_data_bytes(bundles[leg]),
                peak_rss=in_own_process(_use_alone, bundles[leg], arguments.threads),
            )
        )
    return results, skipped


def _data_bytes(folder: Path) -> int:
    """Return the size of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".data", ".safetensors"))


def _peer_calls(
    peer: Peer, folder: Path, sequences: Sequences, threads: int, manifest: "Manifest"
) -> tuple[Call, Call]:
    """Return a peer's calls; its graph, where it has one, takes what the unquantized bundle takes."""

    def open_onnx(path: Path, disabled: Sequence[str]) -> tuple[Call, Call]:
        return _session_calls(_session(path, threads, disabled), manifest)

    return peer.calls(folder, sequences, threads, open_onnx)


def _session_calls(session: "ort.InferenceSession", manifest: "Manifest") -> tuple[Call, Call]:
    return _bound_call(session, manifest, PREFILL_TOKENS, 0), _bound_call(session, manifest, 1, PREFILL_TOKENS)


def interleaved(
    calls: dict[Key, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, Timing]:
    """Time `rounds` calls of each, taking turns; every second round goes backwards, so that none always leads."""
    for call in calls.values():
        for _ in range(WARM_UP_CALLS):
            call()
    seconds: dict[Key, list[float]] = {variant: [] for variant in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for variant in order:
            time.sleep(PAUSE_SECONDS)
            start = clock()
            calls[variant]()
            seconds[variant].append(clock() - start)
    return {variant: Timing.of(durations) for variant, durations in seconds.items()}


def open_session(folder: Path, threads: int, graph: "GenerationGraph | None" = None) -> "ort.InferenceSession":
    """Open a bundle's graph, or the one that generation runs."""
    from spike_export.artifacts.manifest import GRAPH_FILE

    if graph is None:
        return _session(folder / GRAPH_FILE, threads)
    return _session(graph.serialized, threads, weights=(folder, graph.weights))


def _session(
    model: Path | bytes,
    threads: int,
    disabled: Sequence[str] = (),
    weights: tuple[Path, Mapping[str, Any]] | None = None,
) -> "ort.InferenceSession":
    import onnxruntime as ort

    from spike_export.engines.onnx_runtime.session import name_weights, session_options

    options = session_options(threads)
    # Threads that spin after a call would take the cores from the session whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if weights is not None:
        name_weights(options, *weights)
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled) or None
    )


def _bound_call(session: "ort.InferenceSession", manifest: "Manifest", tokens: int, past: int) -> Callable[[], None]:
    """Return a call of one sequence of `tokens` after `past`; inputs and outputs stay in the binding's buffers.

    A static cache is read and written in one place.
    """
    import onnxruntime as ort

    binding = session.io_binding()
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    buffers = []
    for name, value in _inputs(session, manifest, tokens, past).items():
        if manifest.kv_cache == "static" and name.startswith(_PAST):
            buffers.append(ort.OrtValue.ortvalue_from_numpy(value))
            binding.bind_ortvalue_input(name, buffers[-1])
            binding.bind_ortvalue_output(name.replace(_PAST, "present."), buffers[-1])
        else:
            binding.bind_cpu_input(name, value)
    return lambda: session.run_with_iobinding(binding)


def _inputs(session: "ort.InferenceSession", manifest: "Manifest", tokens: int, past: int) -> dict[str, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    fed: dict[str, Any] = {
        "input_ids": random.integers(0, manifest.vocab_size, (1, tokens)),
        "attention_mask": np.ones((1, past + tokens), np.int64),
        "position_ids": np.arange(past, past + tokens)[None],
        "write_indices": np.full(1, past),
        "fresh": np.ones(0 if past else 1, np.bool_),
    }
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    wanted = {value.name: value.type for value in session.get_inputs()}
    # Tokens, mask and positions are the caller's own; the cache also holds the prefix.
    cached = manifest.cache_slots or past + (manifest.cached_prefix_length if past else 0)
    cache_shape = (1, manifest.num_key_value_heads, cached, manifest.head_dim)
    for name, kind in wanted.items():
        if name.startswith(_PAST):
            fed[name] = random.standard_normal(cache_shape, np.float32).astype(dtypes[kind])
    return {name: fed[name] for name in wanted}


def _use_alone(folder: Path, threads: int) -> int:
    """Return the peak resident memory of this process, which uses the bundle and nothing else."""
    from spike_export.artifacts.manifest import load_manifest

    for call in _session_calls(open_session(folder, threads), load_manifest(folder)):
        call()
    return peak_rss()


def _use_peer_alone(name: str, folder: Path, float32: Path, threads: int) -> int:
    """Do the same with a peer's artefact."""
    from spike_export.artifacts.manifest import load_manifest

    peer, manifest = next(each for each in PEERS if each.name == name), load_manifest(float32)
    for call in _peer_calls(peer, folder, Sequences(PREFILL_TOKENS, manifest.vocab_size), threads, manifest):
        call()
    return peak_rss()


def table(results: Sequence[Result]) -> str:
    """Return the figures for reading; ratios are of medians, to the baseline that gives the same logits."""
    width = max(len(result.name) for result in results)
    lines = [
        f"{'variant':{width}} {'int8':>4} {'prefix':>6} | {'prefill 256: ms':>15} {'min':>6} {'tok/s':>6} {'ratio':>6} "
        f"{'to all':>6} | {'decode: ms':>10} {'min':>6} {'tok/s':>6} {'ratio':>6} | {'MB':>5} {'peak RSS MB':>11}"
    ]
    for r in results:
        like, whole = _ratios(_baseline(results, r), r), _ratios(results[0], r)
        lines.append(
            f"{r.name:{width}} {r.int8_linears:4} {r.prefix_length:6} | {_cells(r.prefill, PREFILL_TOKENS, 15)}"
            f" {like[0]:5.2f}x {whole[0]:5.2f}x | {_cells(r.decode, 1, 10)} {like[1]:5.2f}x |"
            f" {r.bundle_bytes / 1e6:5.0f} {r.peak_rss / 1e6:11.0f}"
        )
    lines.append("ratio: to the float32 bundle that gives the same logits; to all: to the one that gives all logits")
    for r in results:
        if r.int8_linears:
            prefill_ratio, decode_ratio = _ratios(_baseline(results, r), r)
            lines.append(
                f"targets for {r.name}: prefill {PREFILL_TARGET}x {_verdict(prefill_ratio, PREFILL_TARGET)}, "
                f"decode {DECODE_TARGET}x {_verdict(decode_ratio, DECODE_TARGET)}"
            )
    return "\n".join(lines)


def _baseline(results: Sequence[Result], result: Result) -> Result:
    """Return the unquantized float32 bundle that gives the same logits as `result`."""
    names = [baseline.name for baseline in BASELINES]
    return next(each for each in results if each.name in names and each.logits == result.logits)


def _cells(timing: Timing, tokens: int, width: int) -> str:
    return f"{timing.median * 1e3:{width}.1f} {timing.minimum * 1e3:6.1f} {tokens / timing.median:6.0f}"


def _ratios(base: Result, result: Result) -> tuple[float, float]:
    return base.prefill.median / result.prefill.median, base.decode.median / result.decode.median


def _verdict(ratio: float, target: float) -> str:
    return "met" if ratio >= target else "missed"


def as_json(results: Sequence[Result], threads: int, cpu_time: bool, skipped: Sequence[Skipped] = ()) -> dict[str, Any]:
    """Return the figures for programs: seconds, bytes, and ratios of medians, to the baseline of the same logits."""
    variants = []
    for result in results:
        ratios = (*_ratios(_baseline(results, result), result), _ratios(results[0], result)[0])
        names = ("prefill_ratio", "decode_ratio", "prefill_ratio_to_all_logits")
        variants.append(asdict(result) | dict(zip(names, ratios, strict=True)))
    return {
        "prefill_tokens": PREFILL_TOKENS,
        "decode_past": PREFILL_TOKENS,
        "threads": threads,
        "clock": "cpu" if cpu_time else "wall",
        "targets": {"prefill_ratio": PREFILL_TARGET, "decode_ratio": DECODE_TARGET},
        "variants": variants,
        "left_out": [asdict(each) for each in skipped],
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
