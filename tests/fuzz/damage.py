"""Damage: how a valid document, file or graph becomes one that a stranger might hand in."""

import copy
import json
import struct
from collections.abc import Sequence
from typing import Any

import onnx
from hypothesis import strategies as st

ODD_NUMBERS = (0, -1, -4, 1, 3, 2**31, 2**32 - 1, 10**9, 10**15, 2**64, 10**30, 0.5, -1.5, 1e-320, 1e300, float("inf"))

ODD_TEXTS = ("", "x", "\0", "\n", "²", "../x", "/etc/hostname", "\ud800", "\x1b[31m", "a" * 5000, "nan", "1e999")

odd = st.one_of(
    st.sampled_from(ODD_NUMBERS),
    st.just(float("nan")),
    st.sampled_from(ODD_TEXTS),
    st.booleans(),
    st.none(),
    st.sampled_from(([], {}, [[]], [None], {"x": 1}, [1, 2], ["x"], [0] * 40)),
)
"""A value that is seldom meant: of another type, out of range, or no text."""

_FEW = st.sampled_from((0, 1, 1, 1, 2, 3))

DEEP = "[" * 60_000


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """Draw a document with a few of its values replaced, left out or put under another name."""
    document = copy.deepcopy(document)
    for _ in range(draw(_FEW)):
        if not _keys(document):
            break
        # Down from the top, so that a key with a thousand entries under it is no likelier than its neighbour.
        parent, last = document, draw(st.sampled_from(_keys(document)))
        while _keys(parent[last]) and draw(st.booleans()):
            parent = parent[last]
            last = draw(st.sampled_from(_keys(parent)))
        how = draw(st.sampled_from(("replace", "replace", "leave out", "rename")))
        if how == "replace":
            parent[last] = copy.deepcopy(draw(odd))
        elif how == "leave out":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(ODD_TEXTS))] = parent.pop(last)
        else:
            parent.append(parent[last])
    return document


@st.composite
def json_text(draw: st.DrawFn, document: Any) -> bytes:
    """Draw the bytes of a damaged document; seldom they are no JSON at all."""
    text = json.dumps(draw(damaged(document)))
    how = draw(st.sampled_from(("whole",) * 12 + ("cut", "deep", "empty", "binary", "twice")))
    others = {
        "cut": text[: draw(st.integers(0, len(text)))].encode() if how == "cut" else b"",
        "deep": DEEP.encode(),
        "empty": b"",
        "binary": b"\xff\xfe\x00",
        "twice": (text * 2).encode(),
    }
    return others.get(how, text.encode("utf-8", "surrogatepass"))


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file with numbers written over some of its bytes, or cut short."""
    changed = bytearray(content)
    for _ in range(draw(_FEW)):
        form = draw(st.sampled_from(("<B", "<I", "<Q")))
        value = draw(st.sampled_from((0, 1, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)))
        place = draw(st.integers(0, max(0, len(changed) - 8)))
        struct.pack_into(form, changed, min(place, max(0, len(changed) - 8)), value % 2 ** (8 * struct.calcsize(form)))
    if draw(st.integers(0, 9)) == 0:
        del changed[draw(st.integers(0, len(changed))) :]
    return bytes(changed)


_GRAPH_DAMAGE = (
    "drop input",
    "swap inputs",
    "drop attributes",
    "odd attribute",
    "operator",
    "name",
    "no outputs",
    "no node",
    "dims",
    "place",
    "type",
    "shape",
)


_ATTRIBUTE_TYPES = (onnx.AttributeProto.STRING, onnx.AttributeProto.GRAPH)


@st.composite
def damaged_graph(draw: st.DrawFn, model: onnx.ModelProto) -> onnx.ModelProto:
    """Draw a model with some nodes, tensors or declarations changed."""
    model = copy.deepcopy(model)
    for _ in range(draw(_FEW)):
        how = draw(st.sampled_from(_GRAPH_DAMAGE))
        if how in ("dims", "place"):
            _damage_tensor(draw, how, model.graph.initializer)
        elif how in ("type", "shape", "no outputs"):
            _damage_declaration(draw, how, model.graph)
        else:
            _damage_node(draw, how, model.graph)
    return model


def _damage_node(draw: st.DrawFn, how: str, graph: onnx.GraphProto) -> None:
    if not graph.node:
        return
    node = graph.node[draw(st.integers(0, len(graph.node) - 1))]
    if how == "drop input" and node.input:
        del node.input[draw(st.integers(0, len(node.input) - 1)) :]
    elif how == "swap inputs" and node.input:
        other = graph.node[draw(st.integers(0, len(graph.node) - 1))]
        node.input[0] = next(iter(other.output), "")
    elif how == "drop attributes":
        del node.attribute[:]
    elif how == "odd attribute":
        for attribute in node.attribute:
            attribute.i = draw(st.sampled_from((-1, 0, 7, 99, 2**40)))
            attribute.type = draw(
                st.sampled_from((attribute.type, onnx.AttributeProto.STRING, onnx.AttributeProto.GRAPH))
            )
    elif how == "operator":
        node.op_type = draw(
            st.sampled_from(("If", "MatMul", "Cast", "DequantizeLinear", "Transpose", "Slice", "", "X"))
        )
    elif how == "name":
        node.name = draw(st.sampled_from(("", "model.layers.1000000000000.x", "model.layers.x", "lm_head.MatMul")))
    elif how == "no node":
        graph.node.remove(node)


def _damage_tensor(draw: st.DrawFn, how: str, tensors: Sequence[onnx.TensorProto]) -> None:
    if not tensors:
        return
    tensor = tensors[draw(st.integers(0, len(tensors) - 1))]
    if how == "dims":
        tensor.dims[:] = draw(st.lists(st.sampled_from((0, 1, -1, 2**31, 2**40)), max_size=4))
        return
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key in draw(st.sets(st.sampled_from(("location", "offset", "length")))):
        values = ("model.onnx.data", "../x", "", "x", "-1", "10", str(2**70), "a\0b", "²")
        tensor.external_data.add(key=key, value=draw(st.sampled_from(values)))


def _damage_declaration(draw: st.DrawFn, how: str, graph: onnx.GraphProto) -> None:
    values = [*graph.input, *graph.output]
    if how == "no outputs" or not values:
        del graph.output[:]
        return
    value = values[draw(st.integers(0, len(values) - 1))]
    if how == "type":
        value.type.Clear()
    else:
        del value.type.tensor_type.shape.dim[draw(st.integers(0, 4)) :]
