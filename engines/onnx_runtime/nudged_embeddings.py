"""A bundle in ONNX Runtime whose embeddings the caller scales, channel by channel: 1 leaves them as they are."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE
from spike_export.checkpoint.checkpoint import EMBEDDING
from spike_export.engines.onnx_runtime.session import BundleSession, open_graph
from spike_export.engines.onnx_runtime.taps import all_logits_model, run_window

_SCALES = "embedding_scales"
_NODE = "model.embed_tokens.Gather"


@dataclass(frozen=True)
class NudgedBundle:
    """A session over the changed graph.

    Attributes:
        width: Channels of an embedding.
        dtype: Precision of the embeddings.
    """

    session: BundleSession
    width: int
    dtype: np.dtype[np.floating]

    def logits(self, content: NDArray[np.int64], scales: NDArray[np.floating] | None = None) -> NDArray[np.float32]:
        """Return the logits [tokens - 1, vocab] that predict a window's content [tokens].

        Args:
            content: Without BOS.
            scales: [width], what each channel of the embeddings is multiplied by; None for 1.
        """
        given = np.ones(self.width) if scales is None else scales
        return run_window(self.session, content, ["logits"], {_SCALES: given.astype(self.dtype)})[0]


def open_nudged(bundle: Path) -> NudgedBundle:
    """Load a bundle into ONNX Runtime with a further input that scales the embeddings; a tied head keeps its weights.

    Raises:
        EngineError: The graph was changed, or ONNX Runtime cannot run the bundle.
    """
    model = all_logits_model(bundle)
    graph = model.graph
    gather = next((node for node in graph.node if node.name == _NODE), None)
    weight = next((tensor for tensor in graph.initializer if tensor.name == EMBEDDING), None)
    if gather is None or weight is None:
        raise EngineError(f"{bundle / GRAPH_FILE}: the graph has no embedding; it was changed, export the bundle again")
    _scale(graph, gather, weight)
    session = open_graph(bundle, model.SerializeToString())
    return NudgedBundle(session, weight.dims[1], helper.tensor_dtype_to_np_dtype(weight.data_type))


def _scale(graph: onnx.GraphProto, gather: onnx.NodeProto, weight: onnx.TensorProto) -> None:
    """Multiply what the embedding gives by the new input, in place."""
    embedded, plain = gather.output[0], f"{gather.output[0]}.plain"
    gather.output[:] = [plain]
    product = helper.make_node("Mul", [plain, _SCALES], [embedded], name="model.embed_tokens.nudge")
    graph.node.insert(list(graph.node).index(gather) + 1, product)
    graph.input.append(helper.make_tensor_value_info(_SCALES, weight.data_type, [weight.dims[1]]))
