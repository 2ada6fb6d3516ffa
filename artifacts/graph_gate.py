"""What makes a parsed ONNX model no graph at all: found before anything walks through its nodes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter

import onnx
from onnx import AttributeProto

_STANDARD = ("", "ai.onnx")

_OF_ONNX_RUNTIME = ("com.microsoft", ("DequantizeLinear", "QuantizeLinear"))
"""Operators of ONNX Runtime's domain with the inputs of the standard ones of the same name."""


def graph_fault(model: onnx.ModelProto) -> str | None:
    """Return why nodes cannot be followed from their outputs to their inputs, or None.

    Names must be text. A node must have an operator, an output, and what its standard operator requires of inputs,
    outputs and attributes, and no value may depend on itself. Operators of other domains, and standard ones that this
    onnx does not know, are not looked into.
    """
    fault = _name_fault(model)
    if fault:
        return fault
    versions = {entry.domain: entry.version for entry in model.opset_import}
    version = versions.get("", versions.get("ai.onnx", onnx.defs.onnx_opset_version()))
    return next((fault for nodes in _bodies(model) if (fault := _fault_of(nodes, version))), None)


def _name_fault(model: onnx.ModelProto) -> str | None:
    """Return which name is no text: protobuf hands out bytes where a stored string is no UTF-8."""
    if not all(isinstance(entry.domain, str) for entry in model.opset_import):
        return "the name of an operator set is no text"
    for graph in (model.graph, *(graph for nodes in _bodies(model) for node in nodes for graph in _graphs(node))):
        values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
        if not all(isinstance(value.name, str) for value in values):
            return "a tensor's name is no text"
    for node in (node for nodes in _bodies(model) for node in nodes):
        names = (node.name, node.op_type, node.domain, *node.input, *node.output)
        if {*map(type, names), *(type(attribute.name) for attribute in node.attribute)} != {str}:
            return f"a name of node {node.name!r} is no text"
        if not node.op_type or not node.output:
            return f"node {node.name!r} has no {'output' if node.op_type else 'operator'}"
    return None


def _bodies(model: onnx.ModelProto) -> Iterator[Sequence[onnx.NodeProto]]:
    waiting: list[Sequence[onnx.NodeProto]] = [model.graph.node, *(function.node for function in model.functions)]
    while waiting:  # it ends: protobuf itself refuses messages that are nested deep
        nodes = waiting.pop()
        yield nodes
        waiting += [graph.node for node in nodes for graph in _graphs(node)]


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _fault_of(nodes: Sequence[onnx.NodeProto], version: int) -> str | None:
    fault = next((fault for node in nodes if (fault := _operator_fault(node, version))), None)
    return fault or _cycle(nodes)


def _operator_fault(node: onnx.NodeProto, version: int) -> str | None:
    domain, same = _OF_ONNX_RUNTIME
    if node.domain not in _STANDARD and not (node.domain == domain and node.op_type in same):
        return None
    needs = _requirements(node.op_type, version)
    if needs is None:
        return None
    given = sum(1 for name in node.input[: needs.inputs] if name)
    if given < needs.inputs:
        return f"node {node.name!r} ({node.op_type}) has {given} of the {needs.inputs} inputs that it needs"
    if len(node.output) < needs.outputs:
        return f"node {node.name!r} ({node.op_type}) has {len(node.output)} of its {needs.outputs} outputs"
    missing = sorted(needs.attributes.difference(attribute.name for attribute in node.attribute))
    if missing:
        return f"node {node.name!r} ({node.op_type}) lacks the attribute {missing[0]!r}"
    return None


@dataclass(frozen=True, slots=True)
class _Requirements:
    """What an operator needs at least: so many inputs and outputs, and attributes of these names."""

    inputs: int
    outputs: int
    attributes: frozenset[str]


@cache
def _requirements(operator: str, version: int) -> _Requirements | None:
    """Return what a standard operator needs; None where this onnx does not know the operator."""
    try:
        schema = onnx.defs.get_schema(operator, version, "")
    except onnx.defs.SchemaError:
        return None
    required = frozenset(name for name, each in schema.attributes.items() if each.required)
    return _Requirements(schema.min_input, schema.min_output, required)


def _in_order(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Tell whether each value has one node, which stands behind those that make its inputs: then there is no cycle."""
    outputs = [output for node in nodes for output in node.output if output]
    later = set(outputs)
    if len(later) < len(outputs):
        return False
    for node in nodes:
        if not later.isdisjoint(node.input):
            return False
        later.difference_update(node.output)
    return True


def _cycle(nodes: Sequence[onnx.NodeProto]) -> str | None:
    """Return which value depends on itself; the order in which the nodes are stored does not matter."""
    if _in_order(nodes):
        return None
    made_of = {output: [name for name in node.input if name] for node in nodes for output in node.output if output}
    try:
        TopologicalSorter(made_of).prepare()
    except CycleError as error:
        return f"value {error.args[1][0]!r} depends on itself"
    return None
