"""A bundle's graph as generation runs it in ONNX Runtime: changed in memory, over the bundle's own weights.

- Of the logits only the last position's are computed: a prompt would otherwise form a row of the vocabulary for each
  of its tokens, which nobody reads.
- A static cache gets a free length. The file fixes it, because TensorRT wants that; ONNX Runtime does not, and
  attention reads the whole buffer: short sequences are cheaper in a short one.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import CACHE_SLOTS, GRAPH_FILE, LAST_TOKEN_NODE, Manifest
from spike_export.engines.plan.graph_file import read_graph, require_output

_LAST = np.iinfo(np.int64).max


def generation_graph(bundle: Path, manifest: Manifest) -> bytes:
    """Return the serialized graph; weights are named as files in the bundle.

    Raises:
        EngineError: The file is not an ONNX model, or lacks the static cache that the manifest speaks of.
    """
    model = read_graph(bundle / GRAPH_FILE)
    if manifest.logits == "all":
        residual = f"model.layers.{manifest.num_hidden_layers - 1}.attention_residual"
        _keep_last_position(model.graph, residual, bundle / GRAPH_FILE)
    if manifest.kv_cache == "static":
        _free_slots(model.graph, bundle / GRAPH_FILE)
    serialized: bytes = model.SerializeToString()
    return serialized


def _keep_last_position(graph: onnx.GraphProto, residual: str, path: Path) -> None:
    """Let all that follows the last attention see the last position only, where the exporter would have cut too.

    A graph without that node, made or changed by hand, keeps all its logits: that is slower, not wrong.
    """
    place = next((index for index, node in enumerate(graph.node) if node.name == residual), None)
    if place is None:
        return
    whole = graph.node[place].output[0]
    last = f"{LAST_TOKEN_NODE}.output"
    for node in graph.node:
        node.input[:] = [last if name == whole else name for name in node.input]
    bounds = {"start": -1, "end": _LAST, "axis": 1, "step": 1}
    names = [f"{LAST_TOKEN_NODE}.{bound}" for bound in bounds]
    graph.initializer.extend(
        numpy_helper.from_array(np.array([value], np.int64), name)
        for name, value in zip(names, bounds.values(), strict=True)
    )
    graph.node.insert(place + 1, helper.make_node("Slice", [whole, *names], [last], name=LAST_TOKEN_NODE))
    logits = require_output(graph, "logits", 3, path)
    logits.type.tensor_type.shape.dim[1].dim_value = 1


def _free_slots(graph: onnx.GraphProto, path: Path) -> None:
    """Take the number of slots from the buffers that a call brings."""
    constant = next((tensor for tensor in graph.initializer if tensor.name == CACHE_SLOTS), None)
    if constant is None:
        raise EngineError(f"{path}: the graph has no static cache (no {CACHE_SLOTS}); export the bundle again")
    caches = [value for value in (*graph.input, *graph.output) if value.name.startswith(("past_", "present."))]
    for value in caches:
        if len(value.type.tensor_type.shape.dim) != 4:
            raise EngineError(f"{path}: {value.name} is no cache of 4 axes; export the bundle again")
        value.type.tensor_type.shape.dim[2].dim_param = "slots"
    graph.initializer.remove(constant)
    ends = {f"{CACHE_SLOTS}.first": 0, f"{CACHE_SLOTS}.step": 1}
    graph.initializer.extend(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in ends.items())
    first, step = ends
    count = f"{CACHE_SLOTS}.count"
    nodes = [
        helper.make_node("Shape", ["past_key_values.0.key"], [f"{count}.shape"], name=f"{count}.Shape", start=2, end=3),
        helper.make_node("Squeeze", [f"{count}.shape"], [count], name=f"{count}.Squeeze"),
        helper.make_node("Range", [first, count, step], [CACHE_SLOTS], name=f"{CACHE_SLOTS}.Range"),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
