"""A bundle's graph as generation runs it in ONNX Runtime: changed in memory, over the bundle's own weights.

- Of the logits only the last position's are computed: a prompt would otherwise form a row of the vocabulary for each
  of its tokens, which nobody reads.
- A static cache gets a free length. The file fixes it, because TensorRT wants that; ONNX Runtime does not, and
  attention reads the whole buffer: short sequences are cheaper in a short one.
- Over a static cache a call says how many of its last positions get logits; a draft is verified at several.
- Where it is asked for, a call can count the activations that it clips (`clipped_activations`).
- On a CPU, attention over a static cache becomes an operator of ONNX Runtime's own, queries bring the scale of its
  scores, products of one tensor become one product, and a residual and the norm behind it one operator; where its INT8
  kernels take unsigned weights, the graph brings those (`lowering`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import CACHE_SLOTS, DATA_FILE, GRAPH_FILE, LAST_TOKEN_NODE, Manifest
from spike_export.engines.onnx_runtime.clipped_activations import count_clipped
from spike_export.engines.onnx_runtime.exact_products import products_saturate
from spike_export.engines.onnx_runtime.lowering.given_weights import WeightFile
from spike_export.engines.onnx_runtime.lowering.grouped_query_attention import lower_attention
from spike_export.engines.onnx_runtime.lowering.packed_products import pack_products
from spike_export.engines.onnx_runtime.lowering.residual_norms import fuse_residual_norms
from spike_export.engines.onnx_runtime.lowering.scaled_queries import scale_queries
from spike_export.engines.onnx_runtime.lowering.unsigned_weights import unsigned_weights
from spike_export.engines.onnx_runtime.lowering.weight_only_products import weigh_only
from spike_export.engines.onnx_runtime.sequences import LOGITS_FROM
from spike_export.engines.plan.graph_file import read_graph, require_output

_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class GenerationGraph:
    """A graph, and what its caller does for it.

    Attributes:
        serialized: The graph; weights are named as files in the bundle.
        prefix: Of a lowered graph: cache input → [1, kv_heads, prefix, head_dim], which the caller writes in front of
            a new sequence, because the graph does not. None of any other graph.
        groups: Of a graph that counts clipped activations: the group of each place that it counts.
        weights: Of a lowered graph: initializer → values, which no file has.
    """

    serialized: bytes
    prefix: Mapping[str, NDArray[Any]] | None = None
    groups: tuple[str, ...] = ()
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def generation_graph(
    bundle: Path, manifest: Manifest, *, lowering: bool = True, clipping: bool = False, weight_only: bool = False
) -> GenerationGraph:
    """Return the graph that generation runs.

    Args:
        bundle: Folder that export wrote.
        manifest: Its manifest.
        lowering: Use operators of ONNX Runtime's own; for the CPU.
        clipping: Let calls count the activations that they clip.
        weight_only: Let a lowered graph multiply by `MatMulNBits`, which is faster for one row; for a processor whose
            INT8 products are exact.

    Raises:
        EngineError: The file is not an ONNX model, or lacks the static cache that the manifest speaks of.
    """
    model = read_graph(bundle / GRAPH_FILE)
    file, prefix = WeightFile(bundle / DATA_FILE), None
    if manifest.logits == "all":
        residual = f"model.layers.{manifest.num_hidden_layers - 1}.attention_residual"
        _keep_last_position(model.graph, residual, bundle / GRAPH_FILE)
    if manifest.kv_cache == "static":
        _free_slots(model.graph, bundle / GRAPH_FILE)
        _free_positions(model.graph, bundle / GRAPH_FILE)
        if lowering:
            prefix = _lowered(model, file)
    weights = _own_weights(model, file, weight_only=weight_only) if lowering else {}
    if lowering:
        fuse_residual_norms(model)
    groups = tuple(site.group for site in count_clipped(model.graph, bundle)) if clipping else ()
    return GenerationGraph(model.SerializeToString(), prefix, groups, weights)


def _lowered(model: onnx.ModelProto, file: WeightFile) -> dict[str, NDArray[Any]] | None:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    prefixes = lower_attention(model)
    if prefixes is None:
        return None
    numbers = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    return {
        cache: file.values(tensors[name]).astype(helper.tensor_dtype_to_np_dtype(numbers[cache]))
        for cache, name in prefixes.items()
    }


def _own_weights(model: onnx.ModelProto, file: WeightFile, *, weight_only: bool) -> dict[str, NDArray[Any]]:
    """Scale queries, pack products, and replace them or turn their weights where that is asked for.

    Returns:
        What no file has.
    """
    made = scale_queries(model, file.values)

    def values(tensor: onnx.TensorProto) -> NDArray[Any]:
        return made[tensor.name] if tensor.name in made else file.values(tensor)

    made |= pack_products(model, values)
    if weight_only:
        made |= weigh_only(model, values)
    elif products_saturate():
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        made |= unsigned_weights(model, lambda name: values(tensors[name]))
    read = {tensor.name for tensor in model.graph.initializer}
    return {name: each for name, each in made.items() if name in read}


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


def _free_positions(graph: onnx.GraphProto, path: Path) -> None:
    """Let each call say how many of its last positions get logits: a draft is verified at all of its tokens."""
    choice = next((node for node in graph.node if node.name == LAST_TOKEN_NODE), None)
    if choice is None:
        return
    choice.input[1] = LOGITS_FROM
    graph.input.append(helper.make_tensor_value_info(LOGITS_FROM, onnx.TensorProto.INT64, [1]))
    require_output(graph, "logits", 3, path).type.tensor_type.shape.dim[1].dim_param = "positions"


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
