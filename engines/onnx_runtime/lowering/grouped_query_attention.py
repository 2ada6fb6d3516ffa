"""A layer's rotation, cache update and attention over a static cache as one `GroupQueryAttention`.

ONNX Runtime's own operator reads the tokens that each row holds; the standard `Attention` reads every slot of the
buffer, and a mask hides those behind the row's end. The operator also rotates, and writes the buffer in place. From a
cache in INT8 it restores what it reads, where the standard operators restore every slot in every call.

It applies to a layer whose queries see all earlier tokens. Left as they are: layers with a sliding window, behind which
the prefix stays visible; scores with a soft cap and operands in INT8, which are nodes of their own; heads that rotate
in part; and heads whose width is no multiple of 16, which the operator refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from spike_export.artifacts.manifest import CACHE_SLOTS
from spike_export.engines.onnx_runtime.lowering.graph_index import GraphIndex, remove_unused
from spike_export.engines.onnx_runtime.lowering.own_operators import DOMAIN, import_domain

OPERATOR = "GroupQueryAttention"

HEAD_MULTIPLE = 16
"""The operator takes heads of a multiple of so many channels."""

_MERGED = "lowering.merged"
"""The last two axes, heads and channels, as one."""

_WITHOUT_POSITIONS_BIAS_AND_SINK = ("", "", "")
"""Inputs in front of the steps."""

_INT8_CACHE = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


@dataclass(frozen=True)
class _Operand:
    """Queries, keys or values behind their projection.

    Attributes:
        heads: [batch, sequence, heads, head_dim], which a projection was split into.
        rotation: The rotary embedding; None of values.
        prefix: What a new sequence begins with, or None.
        steps: Initializer of the steps of keys or values that are cached in INT8, or None.
    """

    heads: str
    rotation: onnx.NodeProto | None = None
    prefix: str | None = None
    steps: str | None = None


@dataclass(frozen=True)
class _Attention:
    """Nodes of one layer that become one.

    Attributes:
        caches: The inputs of keys and values that the layer writes to.
        presents: The outputs that it gives for them.
        merged: [batch, sequence, heads * head_dim], its result.
        num_heads: Of queries.
    """

    node: onnx.NodeProto
    query: _Operand
    key: _Operand
    value: _Operand
    caches: tuple[str, str]
    presents: tuple[str, str]
    merged: onnx.NodeProto
    num_heads: int


def lower_attention(model: onnx.ModelProto) -> dict[str, str] | None:
    """Replace the layers' attention in place.

    Returns:
        Cache input → initializer of the prefix [1, kv_heads, prefix, head_dim] that the graph no longer writes there:
        whoever begins a sequence does. None where nothing was replaced.
    """
    graph, index = model.graph, GraphIndex(model.graph)
    found = [match for node in graph.node if node.op_type == "Attention" and (match := _match(index, node)) is not None]
    if not found:
        return None
    positions = {_positions(match.query) for match in found}
    for place in sorted(positions):
        _insert_lengths(graph, place)
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), _MERGED))
    for match in found:
        _replace(graph, index, match)
    prefixes = {
        cache: operand.prefix
        for match in found
        for cache, operand in zip(match.caches, (match.key, match.value), strict=True)
        if operand.prefix is not None
    }
    remove_unused(graph)
    import_domain(model)
    return prefixes


def _positions(query: _Operand) -> str:
    assert query.rotation is not None, "queries are rotated"
    return str(query.rotation.input[3])


def _match(index: GraphIndex, node: onnx.NodeProto) -> _Attention | None:
    """Return the nodes around an `Attention` if all of them are those that the operator stands for."""
    if len(node.input) != 4 or any(each.name != "scale" for each in node.attribute):
        return None
    scatters = [_read(index, name) for name in node.input[1:3]]
    if None in scatters:
        return None
    key_scatter, value_scatter = (scatter for scatter in scatters if scatter is not None)
    key, value = _written(index, key_scatter, rotates=True), _written(index, value_scatter, rotates=False)
    around = _around(index, node, [key, value], [key_scatter, value_scatter])
    if key is None or value is None or around is None:
        return None
    query = _rotated(index, around[0])
    transposed = index.only_user(around[1], "Transpose")
    merged = index.only_user(transposed.output[0], "Reshape") if transposed else None
    shape = index.small_constant(merged.input[1]) if merged else None
    if query is None or merged is None or shape is None:
        return None
    match = _Attention(
        node,
        query,
        key,
        value,
        (key_scatter.input[0], value_scatter.input[0]),
        (key_scatter.output[0], value_scatter.output[0]),
        merged,
        int(shape[-1]) // _count(index, key_scatter.input[0], axis=3),
    )
    return match if _fits(index, match) else None


def _fits(index: GraphIndex, match: _Attention) -> bool:
    """Tell whether queries and keys rotate by one table, and the mask hides what lies behind a row's end alone."""
    assert match.query.rotation is not None and match.key.rotation is not None  # noqa: PT018
    tables = match.query.rotation.input[1:]
    return (
        len(tables) == 3
        and list(tables) == list(match.key.rotation.input[1:])
        and not match.query.rotation.attribute
        and not match.key.rotation.attribute
        and _is_causal(index, match.node.input[3], tables[2])
        and _count(index, match.caches[0], axis=3) % HEAD_MULTIPLE == 0
    )


def _is_causal(index: GraphIndex, mask: str, positions: str) -> bool:
    """Tell whether a mask compares slots with positions, and these count on from each row's first token."""
    compared, added = index.producer(mask, "LessOrEqual"), index.producer(positions, "Add")
    if compared is None or added is None or compared.input[0] != CACHE_SLOTS:
        return False
    queries = index.producer(compared.input[1], "Unsqueeze")
    counted = index.producer(added.input[1], "Range")
    return queries is not None and queries.input[0] == positions and counted is not None


def _rotated(index: GraphIndex, value: str) -> _Operand | None:
    rotation = index.producer(value, "RotaryEmbedding")
    split = rotation and _split(index, rotation.input[0])
    return _Operand(split, rotation) if split else None


def _written(index: GraphIndex, scatter: onnx.NodeProto, *, rotates: bool) -> _Operand | None:
    """Return keys or values that a call writes, without the prefix in front of them."""
    new, prefix = scatter.input[1], None
    joined = index.producer(new, "Concat")
    if joined is not None:
        repeated = index.producer(_uncast(index, _unrounded(index, joined.input[0])), "Tile")
        if repeated is None:
            return None
        new, prefix = joined.input[1], repeated.input[0]
    divided, steps = index.producer(_unrounded(index, new), "Div"), None
    if divided is not None:
        new, steps = _uncast(index, divided.input[0]), str(divided.input[1])
    found = _rotated(index, new) if rotates else _Operand(split) if (split := _split(index, new)) else None
    return found and _Operand(found.heads, found.rotation, prefix, steps)


def _read(index: GraphIndex, value: str) -> onnx.NodeProto | None:
    """Return what writes the cache that attention reads, past a dequantizer of one step."""
    restored = index.producer(_uncast(index, value), "DequantizeLinear")
    if restored is not None and _is_one(index, restored.input[1]):
        value = restored.input[0]
    return index.producer(value, "TensorScatter")


def _around(
    index: GraphIndex,
    node: onnx.NodeProto,
    operands: Sequence[_Operand | None],
    scatters: Sequence[onnx.NodeProto],
) -> tuple[str, str] | None:
    """Return queries and result without the steps of keys and values; None where not all parts of INT8 are there."""
    in_steps = {operand is not None and operand.steps is not None for operand in operands}
    restored = {read != scatter.output[0] for read, scatter in zip(node.input[1:3], scatters, strict=True)}
    if in_steps != restored or len(in_steps) > 1:
        return None
    if in_steps == {False}:
        return node.input[0], node.output[0]
    scaled, rescaled = index.producer(node.input[0], "Mul"), index.only_user(node.output[0], "Mul")
    return None if scaled is None or rescaled is None else (scaled.input[0], rescaled.output[0])


def _unrounded(index: GraphIndex, value: str) -> str:
    """Return what a quantizer of one step rounds, or the value itself."""
    quantizer = index.producer(value, "QuantizeLinear")
    return value if quantizer is None or not _is_one(index, quantizer.input[1]) else str(quantizer.input[0])


def _uncast(index: GraphIndex, value: str) -> str:
    cast = index.producer(value, "Cast")
    return value if cast is None else str(cast.input[0])


def _is_one(index: GraphIndex, name: str) -> bool:
    scale = index.small_constant(name)
    return scale is not None and scale.tolist() == 1


def _split(index: GraphIndex, value: str) -> str | None:
    """Return [batch, sequence, heads, head_dim] of a value [batch, heads, sequence, head_dim]."""
    transposed = index.producer(value, "Transpose")
    if transposed is None or list(transposed.attribute[0].ints) != [0, 2, 1, 3]:
        return None
    return str(transposed.input[0])


def _count(index: GraphIndex, cache: str, axis: int) -> int:
    """Return the size of an axis of a cache, as the graph declares it."""
    value = next(value for value in index.graph.input if value.name == cache)
    return int(value.type.tensor_type.shape.dim[axis].dim_value)


def _insert_lengths(graph: onnx.GraphProto, positions: str) -> None:
    """Append behind the positions what the operator is told: each row's last slot, and the longest row's tokens."""
    place = next(number for number, node in enumerate(graph.node) if positions in node.output)
    last, longest = (f"{positions}.{name}" for name in ("last", "longest"))
    one, axis = "lowering.one", "lowering.columns"
    if one not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), one))
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), axis))
    nodes = (
        helper.make_node("ReduceMax", [positions, axis], [f"{last}.int64"], name=last, keepdims=0),
        helper.make_node("Cast", [f"{last}.int64"], [last], name=f"{last}.Cast", to=onnx.TensorProto.INT32),
        helper.make_node("ReduceMax", [positions], [f"{longest}.last"], name=longest, keepdims=0),
        helper.make_node("Add", [f"{longest}.last", one], [f"{longest}.int64"], name=f"{longest}.Add"),
        helper.make_node("Cast", [f"{longest}.int64"], [longest], name=f"{longest}.Cast", to=onnx.TensorProto.INT32),
    )
    for node in reversed(nodes):
        graph.node.insert(place + 1, node)


def _replace(graph: onnx.GraphProto, index: GraphIndex, match: _Attention) -> None:
    """Put the operator in front of the reshaped result, which it gives itself; the nodes it stands for lose theirs."""
    positions = _positions(match.query)
    assert match.query.rotation is not None, "queries are rotated"
    cos, sin = match.query.rotation.input[1:3]
    name, operands = match.node.name, (match.query, match.key, match.value)
    merged = [_merged_heads(index, operand, f"{name}.{kind}") for kind, operand in zip("qkv", operands, strict=True)]
    outputs = [match.merged.output[0], *match.presents]
    for node in (match.merged, *(index.producers[present] for present in match.presents)):
        node.output[0] = f"{node.output[0]}.unused"
    attributes: dict[str, Any] = {
        "num_heads": match.num_heads,
        "kv_num_heads": _count(index, match.caches[0], axis=1),
        "do_rotary": 1,
        **{each.name: each.f for each in match.node.attribute},
    }
    lengths = (f"{positions}.last", f"{positions}.longest")
    inputs = [*(value for value, _ in merged), *match.caches, *lengths, cos, sin]
    if match.key.steps is not None and match.value.steps is not None:
        inputs += [*_WITHOUT_POSITIONS_BIAS_AND_SINK, match.key.steps, match.value.steps]
        attributes |= _INT8_CACHE
    node = helper.make_node(OPERATOR, inputs, outputs, name=f"{name}.{OPERATOR}", domain=DOMAIN, **attributes)
    place = next(number for number, each in enumerate(graph.node) if each.name == match.merged.name)
    for each in (node, *(reshaped for _, reshaped in reversed(merged) if reshaped is not None)):
        graph.node.insert(place, each)


def _merged_heads(index: GraphIndex, operand: _Operand, name: str) -> tuple[str, onnx.NodeProto | None]:
    """Return [batch, sequence, heads * head_dim], and the node that makes it where the split did not begin there."""
    split = index.producer(operand.heads, "Reshape")
    if split is not None:
        return split.input[0], None
    return f"{name}.merged", helper.make_node("Reshape", [operand.heads, _MERGED], [f"{name}.merged"], name=name)
