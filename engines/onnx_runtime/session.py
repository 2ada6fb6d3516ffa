"""A bundle in ONNX Runtime: the embedded engine, on any machine."""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import DATA_FILE, GRAPH_FILE, Manifest, load_manifest
from spike_export.artifacts.process.host_memory import require_available
from spike_export.artifacts.process.threads import allowed_threads
from spike_export.engines.onnx_runtime.all_logits import all_logits_graph
from spike_export.engines.onnx_runtime.attention_kernels import scores_in_rows
from spike_export.engines.onnx_runtime.cache_memory import Provider
from spike_export.engines.onnx_runtime.clipped_activations import ClippedActivations
from spike_export.engines.onnx_runtime.denormals import denormals_flushed
from spike_export.engines.onnx_runtime.exact_products import products_saturate, request_exact_products
from spike_export.engines.onnx_runtime.generation_graph import GenerationGraph, generation_graph
from spike_export.engines.onnx_runtime.sequences import (
    COMPUTED,
    DynamicSequences,
    Sequences,
    StaticSequences,
    cache_type,
    run_failure,
)

_PROVIDERS: dict[Provider, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

WeightsCopy = Literal["never", "auto"]
"""Whether a bundle's INT8 weights are held a second time, for steps of single rows.

`auto` holds them for a lowered graph over a static cache, where the processor has VNNI: elsewhere the copy is no
faster.
"""

_SPIN_MICROSECONDS = "50"
"""How long an idle thread looks for work before it sleeps: long enough for the gap between two operators."""

_shared: "weakref.WeakValueDictionary[tuple[object, ...], Any]" = weakref.WeakValueDictionary()
_graphs: "weakref.WeakKeyDictionary[Any, GenerationGraph]" = weakref.WeakKeyDictionary()
"""Session → its graph without bytes and weights: what it leaves to the caller. Sequences hold the session alone, so
that it is what lives."""
_sharing = threading.Lock()


@dataclass(frozen=True)
class BundleSession:
    """An ONNX Runtime session over a bundle, with the manifest that says how to call it.

    Attributes:
        provider: Where it computes and keeps its caches.
        prefix: Of a lowered graph (`GenerationGraph`): cache input → keys or values of the prefix.
        groups: Of a graph that counts clipped activations (`GenerationGraph`).
        sample_clipping: Share of the calls over a static cache that count them.
        single_row: Session for one token of one row over the same cache, or None.
    """

    manifest: Manifest
    session: Any
    provider: Provider = "cpu"
    prefix: Mapping[str, NDArray[Any]] | None = None
    groups: tuple[str, ...] = ()
    sample_clipping: float = 0.0
    single_row: Any = None

    def prefill(self, content: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run fresh sequences in one call and return the logits [batch, tokens, vocab] of the content's tokens.

        A bundle of last-token logits gives [batch, 1, vocab], unless it was opened for all of them.

        Args:
            content: [batch, tokens] text without BOS; BOS is fed before it unless the prefix holds it.

        Raises:
            EngineError: ONNX Runtime fails, for instance on more tokens than the model takes, or a static cache has
                no room for them.
        """
        from spike_export.calibration.decoder.perplexity import with_bos  # generation never comes here

        manifest = self.manifest
        holds_bos = manifest.prefix is not None and manifest.prefix.holds_bos
        tokens = content if holds_bos else with_bos(content, manifest.bos_token_id)
        if manifest.kv_cache == "static":
            return self.begin(len(tokens)).step(tokens)[:, -content.shape[1] :]
        # Bound outputs would keep all of the cache, which nobody reads here.
        feeds: dict[str, NDArray[Any]] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        shape = (len(tokens), manifest.num_key_value_heads, 0, manifest.head_dim)
        empty = np.zeros(shape, cache_type(manifest))
        for layer in range(manifest.num_hidden_layers):
            feeds[f"past_key_values.{layer}.key"] = feeds[f"past_key_values.{layer}.value"] = empty
        try:
            with denormals_flushed():
                logits: NDArray[np.float32] = self.session.run(["logits"], feeds)[0]
        except Exception as error:  # ONNX Runtime's exceptions have no common type
            raise run_failure(error, tokens.shape[1]) from error
        return logits[:, -content.shape[1] :]

    def begin(self, batch: int) -> Sequences:
        """Return `batch` sequences without tokens; their BOS, where the prefix holds none, is the caller's to feed."""
        if self.manifest.kv_cache == "static":
            clipped = ClippedActivations(self.groups, self.sample_clipping) if self.groups else None
            return StaticSequences.begin(
                self.session, self.manifest, batch, self.provider, self.prefix, clipped, self.single_row
            )
        return DynamicSequences.begin(self.session, self.manifest, batch, self.provider)


def session_options(threads: int = 0) -> Any:
    """Return ONNX Runtime's options for a bundle.

    Masked scores leave the softmax as denormal numbers, on which a CPU works tens of times slower: flushing them to
    zero takes two thirds off the attention of a 256-token prefill (docs/decisions/denormals.md). INT8 products are
    exact on every processor (docs/decisions/exact-products.md).

    A thread that has nothing to do sleeps after a moment, for other processes' sake (docs/decisions/threads.md).

    Args:
        threads: For one operator; 0 for as many as this process is allowed, else one per core.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or allowed_threads() or 0
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    options.log_severity_level = 4  # errors are raised, and told by the caller
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    request_exact_products(options)
    return options


def runnable_manifest(bundle: Path) -> Manifest:
    """Return the manifest of a bundle that ONNX Runtime can run on the CPU, as far as can be told without loading it.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: The bundle is incomplete, or of a precision that the CPU lacks.
    """
    manifest = load_manifest(bundle)
    if manifest.dtype not in COMPUTED:
        raise EngineError(
            f"{bundle}: ONNX Runtime's CPU kernels have no {manifest.dtype}; export with --dtype float16 or float32"
        )
    for name in (GRAPH_FILE, DATA_FILE):
        if not (bundle / name).is_file():
            raise EngineError(f"{bundle / name}: this file is missing; export the bundle again")
    return manifest


def open_bundle(bundle: Path, threads: int = 0, *, all_logits: bool = False) -> BundleSession:
    """Load a bundle into ONNX Runtime on the CPU.

    Args:
        bundle: Folder that export wrote.
        threads: For one operator; 0 for as many as this process is allowed, else one per core.
        all_logits: Give the logits of all tokens, also where the bundle gives the last one's only.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: The bundle is incomplete, of a precision that the CPU lacks, or refused by ONNX Runtime.
    """
    manifest = runnable_manifest(bundle)
    if all_logits and manifest.logits == "last":
        return BundleSession(manifest, _session(bundle, all_logits_graph(bundle), threads))
    return BundleSession(manifest, _session(bundle, bundle / GRAPH_FILE, threads))


def open_graph(bundle: Path, graph: bytes, threads: int = 0) -> BundleSession:
    """Load a serialized graph that was made of a bundle's, and reads its weights, into ONNX Runtime on the CPU.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: The bundle is incomplete, of a precision that the CPU lacks, or the graph is refused.
    """
    return BundleSession(runnable_manifest(bundle), _session(bundle, graph, threads))


def open_for_generation(
    bundle: Path,
    threads: int = 0,
    provider: Provider = "cpu",
    *,
    lowering: bool = True,
    sample_clipping: float = 0.0,
    weights_copy: WeightsCopy = "never",
) -> BundleSession:
    """Load a bundle's graph as generation runs it (`generation_graph`).

    Who opens the same bundle in the same way again, while the session is in use, shares it: a session may be run from
    several threads, and each copy would hold weights of its own, packed for the processor.

    Args:
        bundle: Folder that export wrote.
        threads: For one operator; 0 for as many as this process is allowed, else one per core.
        provider: Where to compute.
        lowering: Use operators of ONNX Runtime's own where the CPU computes.
        sample_clipping: Share of the calls that count clipped activations; 0 for a graph that cannot.
        weights_copy: Whether steps of one row compute with a copy of the weights; not where activations are counted.

    Raises:
        ArtifactError: The manifest cannot be read.
        EngineError: The bundle is incomplete, of a precision that ONNX Runtime lacks, or refused by it; or the
            provider is not there.
    """
    manifest = runnable_manifest(bundle)
    require_provider(provider)
    clipping = sample_clipping != 0
    if clipping and manifest.kv_cache != "static":
        raise EngineError(
            f"{bundle}: clipped activations are counted over a static cache; export with --kv-cache static"
        )
    lowering = lowering and provider == "cpu"
    session = _shared_session(bundle, manifest, threads, provider, lowering=lowering, clipping=clipping)
    copies = weights_copy == "auto" and lowering and not clipping and _copy_pays(manifest)
    single = _shared_session(bundle, manifest, threads, provider, lowering=True, weight_only=True) if copies else None
    graph = _graphs[session]
    return BundleSession(manifest, session, provider, graph.prefix, graph.groups, sample_clipping, single)


def _copy_pays(manifest: Manifest) -> bool:
    """Tell whether single rows are faster with weights of their own: INT8 ones, on a processor with VNNI."""
    in_int8 = any(name.startswith("int8") for name in manifest.linears)
    return manifest.kv_cache == "static" and manifest.dtype == "float32" and in_int8 and not products_saturate()


def _shared_session(
    bundle: Path,
    manifest: Manifest,
    threads: int,
    provider: Provider,
    *,
    lowering: bool,
    clipping: bool = False,
    weight_only: bool = False,
) -> Any:
    """Return a session over a bundle's `generation_graph`: the one that is in use, or a new one."""
    stamps = ((bundle / name).stat() for name in (GRAPH_FILE, DATA_FILE))
    files = tuple((stamp.st_ino, stamp.st_mtime_ns) for stamp in stamps)
    key = (bundle.resolve(), files, threads, provider, lowering, clipping, weight_only)
    with _sharing:
        session = _shared.get(key)
        if session is None:
            graph = generation_graph(bundle, manifest, lowering=lowering, clipping=clipping, weight_only=weight_only)
            session = _session(bundle, graph.serialized, threads, provider, graph.weights)
            _shared[key], _graphs[session] = session, replace(graph, serialized=b"", weights={})
    return session


def require_provider(provider: str) -> None:
    """Refuse a provider that this ONNX Runtime does not have.

    Raises:
        EngineError: Names it, and what to do.
    """
    import onnxruntime as ort

    if provider not in _PROVIDERS:
        raise EngineError(f"provider {provider!r} is not known; expected one of {', '.join(_PROVIDERS)}")
    if _PROVIDERS[provider] not in ort.get_available_providers():
        raise EngineError(
            f"provider {provider!r}: the installed ONNX Runtime has no {_PROVIDERS[provider]}; install the extra `gpu` "
            "(onnxruntime-gpu in place of onnxruntime), or use the provider cpu"
        )


def name_weights(options: Any, bundle: Path, weights: Mapping[str, NDArray[Any]]) -> None:
    """Tell a session over a graph in memory where its weights are: in a bundle's file, or the graph's own."""
    import onnxruntime as ort

    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    values = [ort.OrtValue.ortvalue_from_numpy(each) for each in weights.values()]
    options.add_external_initializers(list(weights), values)


def _session(
    bundle: Path,
    graph: Path | bytes,
    threads: int,
    provider: Provider = "cpu",
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> Any:
    """Return a session over a graph whose weights are the bundle's, or those of `weights`."""
    import onnxruntime as ort

    size = (bundle / DATA_FILE).stat().st_size
    require_available(size, f"{bundle}: its weights", "free memory, or run it on a larger machine", EngineError)
    options = session_options(threads)
    if isinstance(graph, bytes):
        name_weights(options, bundle, weights or {})
    providers = list(dict.fromkeys((_PROVIDERS[provider], _PROVIDERS["cpu"])))
    try:
        with denormals_flushed(), scores_in_rows():
            session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise EngineError(f"{bundle}: ONNX Runtime refuses the graph: {str(error).splitlines()[0]}") from error
    if session.get_providers()[0] != _PROVIDERS[provider]:
        raise EngineError(
            f"{bundle}: ONNX Runtime could not start its {_PROVIDERS[provider]}, which needs a CUDA device with its "
            "driver and the CUDA libraries; use the provider cpu"
        )
    return session
