"""Rules about the cache of keys and values: TensorScatter, and past and present among inputs and outputs."""

import re
from collections import defaultdict
from collections.abc import Iterator

from onnx import TensorProto

from spike_export.engines.lint.finding import Hit, Rule
from spike_export.engines.lint.operands import type_name
from spike_export.engines.lint.view import Dimension, GraphModel, Node

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT32, TensorProto.UNDEFINED)

_PAST = re.compile(r"^past_key_values\.(\d+)\.(key|value)$")

_HEADS, _CHANNELS = 1, 3
"""Axes of a cache [batch, kv_heads, length, head_dim] whose sizes the compiler must know."""


def _forms(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("TensorScatter"):
        cache = node.input_type(0)
        rank = None if cache.shape is None else len(cache.shape)
        if rank is not None and rank != 4:
            yield Hit(f"its cache is {rank}-D and TensorRT takes 4-D", node)
        axis = int(node.attribute("axis", -2))
        if axis != -2 and (rank is None or axis != rank - 2):
            yield Hit(f"it writes along axis {axis}; TensorRT takes -2, the length, only", node)
        mode = node.attribute("mode", "linear")
        if mode != "linear":
            yield Hit(f"TensorRT refuses its mode {mode!r}", node)
        if cache.elem not in _TYPES:
            yield Hit(f"its cache is {type_name(cache.elem)}, which TensorRT refuses", node)


def _capacities(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("TensorScatter"):
        shape = node.input_type(0).shape
        if shape is not None and len(shape) == 4 and not isinstance(shape[2], int):
            yield Hit("the length of its cache is not static, and TensorRT refuses that", node)


def _places(model: GraphModel) -> Iterator[Hit]:
    main = model.main
    for node in model.of("TensorScatter"):
        cache = node.input(0)
        if node.scope is not main or cache not in main.inputs:
            yield Hit(f"its cache {cache!r} is no graph input, which TensorRT refuses", node)
        if node.scope is not main or node.proto.output[0] not in main.outputs:
            yield Hit(f"its output {node.proto.output[0]!r} is no graph output, which TensorRT refuses", node)


def _shared(model: GraphModel) -> Iterator[Hit]:
    writers: dict[tuple[int, str], list[Node]] = defaultdict(list)
    for node in model.of("TensorScatter"):
        writers[id(node.scope), node.input(0)].append(node)
    for (_, cache), nodes in writers.items():
        if len(nodes) > 1:
            yield Hit(f"{len(nodes)} TensorScatter write to the cache {cache!r}; TensorRT takes one", nodes[1])


def _copied(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("TensorScatter"):
        for reader, _ in node.readers():
            if reader.op == "Concat":
                yield Hit(f"{reader.label!r} copies the whole cache in every call", node)


def _cache_shapes(model: GraphModel) -> Iterator[Hit]:
    inputs, outputs = model.main.inputs, model.main.outputs
    for name, past in inputs.items():
        match = _PAST.match(name)
        if match is None:
            continue
        present_name = f"present.{match.group(1)}.{match.group(2)}"
        present = outputs.get(present_name)
        if present is None:
            yield Hit(f"there is no output {present_name!r} to go on from", subject=name)
        elif past.elem != present.elem:
            yield Hit(f"it is {type_name(past.elem)} and {present_name} {type_name(present.elem)}", subject=name)
        if past.shape is None or len(past.shape) != 4:
            yield Hit("its shape is not [batch, kv_heads, length, head_dim]", subject=name)
            continue
        for axis, meaning in ((_HEADS, "kv_heads"), (_CHANNELS, "head_dim")):
            if not isinstance(past.shape[axis], int):
                yield Hit(f"{meaning} is not static, so that no profile but this one size is sound", subject=name)
            elif present is not None and _differs(present.shape, axis, past.shape[axis]):
                yield Hit(f"{meaning} is {past.shape[axis]} and another one in {present_name}", subject=name)


def _differs(shape: tuple[Dimension, ...] | None, axis: int, size: Dimension) -> bool:
    return shape is not None and (len(shape) != 4 or (isinstance(shape[axis], int) and shape[axis] != size))


CACHE_RULES: tuple[Rule, ...] = (
    Rule(
        "scatter-form",
        "error",
        "A TensorScatter that TensorRT refuses",
        "scatter along axis -2 of a [batch, kv_heads, length, head_dim] cache in 16 or 32 bit, mode linear",
        _forms,
    ),
    Rule(
        "scatter-capacity",
        "error",
        "A TensorScatter into a cache of dynamic length",
        "give the cache a fixed capacity",
        _capacities,
    ),
    Rule(
        "scatter-place",
        "error",
        "A TensorScatter that does not go from a graph input to a graph output",
        "scatter into the input itself and make the result an output",
        _places,
    ),
    Rule(
        "scatter-shared",
        "error",
        "Two TensorScatter on one cache",
        "concatenate the updates and scatter once",
        _shared,
    ),
    Rule(
        "scattered-cache-copied",
        "warning",
        "A scattered cache that is concatenated",
        "scatter everything, the prefix too, into the cache",
        _copied,
    ),
    Rule(
        "cache-shape",
        "warning",
        "Past and present that do not fit each other",
        "declare kv_heads and head_dim as numbers, alike in past and present, and a present for each past",
        _cache_shapes,
    ),
)
