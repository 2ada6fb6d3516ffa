"""Values inside a bundle's graph under the names that the model's parts have, read out of a run.

The graph is changed in memory: values become outputs, and the bundle's own weights are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.engines.onnx_runtime.all_logits import all_logits_graph
from spike_export.engines.onnx_runtime.denormals import denormals_flushed
from spike_export.engines.onnx_runtime.sequences import cache_type, run_failure
from spike_export.engines.onnx_runtime.session import BundleSession, open_graph, runnable_manifest
from spike_export.engines.plan.graph_file import read_graph

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Station:
    """A value that is compared: what a part of the model reads, or what the part gives.

    Attributes:
        module: HF name of a linear (`model.layers.0.mlp.down_proj`), of a layer (`model.layers.0`) or of the embedding
            (`model.embed_tokens`), or `logits`.
    """

    module: str
    side: Side


EMBEDDED = Station("model.embed_tokens", "output")
"""What the first layer reads."""

LOGITS = Station("logits", "output")

Values = Mapping[Station, NDArray[Any]]
"""Station → [windows, tokens, channels]."""


@dataclass(frozen=True)
class TappedBundle:
    """A bundle in ONNX Runtime whose inner values can be read.

    Attributes:
        tensors: Station → name of the graph's value.
    """

    session: BundleSession
    tensors: Mapping[Station, str]

    def run(self, tokens: NDArray[np.int64]) -> dict[Station, NDArray[Any]]:
        """Run fresh sequences [windows, tokens], BOS included where the prefix holds none; return all values.

        Raises:
            EngineError: ONNX Runtime fails.
        """
        names = list(dict.fromkeys(self.tensors.values()))
        try:
            with denormals_flushed():
                found = self.session.session.run(names, fresh_feeds(self.session, tokens))
        except Exception as error:  # ONNX Runtime's exceptions have no common type
            raise run_failure(error, tokens.shape[1]) from error
        values = dict(zip(names, found, strict=True))
        return {station: values[name] for station, name in self.tensors.items()}


def fresh_feeds(session: BundleSession, tokens: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return the inputs of a call with fresh sequences [batch, tokens], BOS included where the prefix holds none."""
    batch, manifest = len(tokens), session.manifest
    feeds: dict[str, NDArray[Any]] = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "write_indices": np.zeros(batch, np.int64),
        "fresh": np.ones(1, np.bool_),
    }
    past = (batch, manifest.num_key_value_heads, manifest.cache_slots or 0, manifest.head_dim)
    empty = np.zeros(past, cache_type(manifest))
    return {value.name: feeds.get(value.name, empty) for value in session.session.get_inputs()}


def run_window(
    session: BundleSession,
    content: NDArray[np.int64],
    outputs: Sequence[str],
    given: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> list[NDArray[Any]]:
    """Run one window [tokens] without BOS as a fresh sequence and return outputs of the graph.

    Args:
        session: Over a graph that gives all logits.
        content: The window; BOS is fed before it unless the prefix holds it.
        outputs: Names, the logits' first: of them those that predict the content are returned, [tokens - 1, vocab].
        given: Inputs that only a changed graph has.

    Raises:
        EngineError: ONNX Runtime fails.
    """
    manifest = session.manifest
    holds_bos = manifest.prefix is not None and manifest.prefix.holds_bos
    fed = content[None] if holds_bos else with_bos(content[None], manifest.bos_token_id)
    feeds = {**fresh_feeds(session, fed), **given}
    try:
        with denormals_flushed():
            logits, *others = session.session.run(list(outputs), feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise run_failure(error, len(content)) from error
    return [logits[0, -len(content) : -1], *others]


def open_tapped(bundle: Path, linears: Sequence[str], layers: int) -> TappedBundle:
    """Load a bundle into ONNX Runtime, with the inputs and outputs of linears and layers as outputs of the graph.

    Args:
        bundle: Folder that export wrote.
        linears: HF names of the linears to read; those of experts stand in branches, whose values cannot be read.
        layers: Decoder layers.

    Raises:
        EngineError: The graph lacks one of them, or ONNX Runtime cannot run the bundle.
    """
    path, model = bundle / GRAPH_FILE, all_logits_model(bundle)
    tensors = _tensors(model.graph, linears, layers, path)
    known = {value.name for value in model.graph.output}
    added = [name for name in dict.fromkeys(tensors.values()) if name not in known]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in added)
    return TappedBundle(open_graph(bundle, model.SerializeToString()), tensors)


def all_logits_model(bundle: Path) -> onnx.ModelProto:
    """Return a bundle's graph without its weights, giving the logits of all tokens.

    Raises:
        EngineError: The bundle is incomplete, or of a precision that the CPU lacks.
    """
    if runnable_manifest(bundle).logits == "last":
        return onnx.load_from_string(all_logits_graph(bundle))
    return read_graph(bundle / GRAPH_FILE)


def _tensors(graph: onnx.GraphProto, linears: Sequence[str], layers: int, path: Path) -> dict[Station, str]:
    nodes = {node.name: node for node in graph.node}
    makers = {output: node for node in graph.node for output in node.output}
    found: dict[Station, str] = {}
    try:
        found[EMBEDDED] = _output(EMBEDDED.module, ("embedding_scaled", "Gather"), nodes)
        for module in linears:
            found[Station(module, "input")] = _input(module, nodes, makers)
            found[Station(module, "output")] = _output(module, ("Add", "token_rescale", "MatMul"), nodes)
        for index in range(layers):
            name = f"model.layers.{index}"
            found[Station(name, "output")] = nodes[f"{name}.mlp_residual"].output[0]
    except KeyError as error:
        raise EngineError(f"{path}: the graph has no node {error}; it was changed, export the bundle again") from error
    return {**found, LOGITS: "logits"}


def _input(module: str, nodes: Mapping[str, onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]) -> str:
    """Return what a linear reads, before its tokens are divided by steps of their own, and before any rounding."""
    reader = nodes.get(f"{module}.QuantizeLinear") or nodes[f"{module}.MatMul"]
    name = reader.input[0]
    if f"{module}.token_rescale" in nodes:
        name = makers[name].input[0]
    while name in makers and makers[name].op_type == "Cast":
        name = makers[name].input[0]
    return str(name)


def _output(module: str, labels: Sequence[str], nodes: Mapping[str, onnx.NodeProto]) -> str:
    """Return what the last node of a module gives, of which only the last label's is in every graph."""
    names = [f"{module}.{label}" for label in labels]
    last = next((name for name in names if name in nodes), names[-1])
    return str(nodes[last].output[0])
