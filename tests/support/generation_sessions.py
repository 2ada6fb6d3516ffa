"""A session over a graph of generation that no other session shares."""

from pathlib import Path

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime.generation_graph import GenerationGraph
from spike_export.engines.onnx_runtime.session import BundleSession, name_weights, session_options


def opened(bundle: Path, graph: GenerationGraph) -> BundleSession:
    """Open a graph of a bundle on one thread."""
    import onnxruntime as ort

    options = session_options(1)
    name_weights(options, bundle, graph.weights)
    session = ort.InferenceSession(graph.serialized, options, providers=["CPUExecutionProvider"])
    return BundleSession(load_manifest(bundle), session, "cpu", graph.prefix)
