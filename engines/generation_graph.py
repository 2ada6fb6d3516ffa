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

from spike_export.export.manifest import GRAPH_FILE, LAST_TOKEN_NODE, Manifest

_SLOTS = "cache.slots"
"""The numbers 0, 1, ... of a static buffer's slots: a constant in the file."""

_LAST = np.iinfo(np.int64).max


def generation_graph(bundle: Path, manifest: Manifest) -> bytes:
    """Return the serialized graph; weights are named as files in the bundle."""
    model = onnx.load(bundle / GRAPH_FILE, load_external_data=False)
    if manifest.logits == "all":
        _keep_last_position(model.graph, f"model.layers.{manifest.num_hidden_layers - 1}.attention_residual")
    if manifest.kv_cache == "static":
        _free_slots(model.graph)
    serialized: bytes = model.SerializeToString()
    return serialized


def _keep_last_position(graph: onnx.GraphProto, residual: str) -> None:
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
    logits = next(value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_value = 1


def _free_slots(graph: onnx.GraphProto) -> None:
    """Take the number of slots from the buffers that a call brings."""
    caches = [value for value in (*graph.input, *graph.output) if value.name.startswith(("past_", "present."))]
    for value in caches:
        value.type.tensor_type.shape.dim[2].dim_param = "slots"
    constant = next(tensor for tensor in graph.initializer if tensor.name == _SLOTS)
    graph.initializer.remove(constant)
    ends = {f"{_SLOTS}.first": 0, f"{_SLOTS}.step": 1}
    graph.initializer.extend(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in ends.items())
    first, step = ends
    count = f"{_SLOTS}.count"
    nodes = [
        helper.make_node("Shape", ["past_key_values.0.key"], [f"{count}.shape"], name=f"{count}.Shape", start=2, end=3),
        helper.make_node("Squeeze", [f"{count}.shape"], [count], name=f"{count}.Squeeze"),
        helper.make_node("Range", [first, count, step], [_SLOTS], name=f"{_SLOTS}.Range"),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
