"""The function that a gated linear unit applies to its gate."""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from spike_export.checkpoint.families import Activation
from spike_export.export.graph.graph_builder import GraphBuilder


def _silu(b: GraphBuilder, module: str, gate: ir.Value) -> ir.Value:
    sigmoid = b.op("Sigmoid", [gate], module)
    return b.op("Mul", [gate, sigmoid], module, label="silu")


def _gelu_tanh(b: GraphBuilder, module: str, gate: ir.Value) -> ir.Value:
    return b.op("Gelu", [gate], module, attributes={"approximate": "tanh"})


ACTIVATIONS: Mapping[Activation, Callable[[GraphBuilder, str, ir.Value], ir.Value]] = {
    "silu": _silu,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""HF's name → appends the function of a gate's values, in their precision, to the nodes of a module."""
