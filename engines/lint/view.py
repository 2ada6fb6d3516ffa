"""A model as the linter's rules see it: nodes with their producers, readers, types and constants, in every graph.

Subgraphs (the bodies of If, Loop, Scan) see the values of the graph around them; local functions stand alone, and what
their parameters are is unknown there.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto

from spike_export.engines.lint.reading import ModelFile

Dimension = int | str | None
"""A size, a symbol, or unknown."""

STANDARD_DOMAINS = ("", "ai.onnx")
ONNX_RUNTIME_DOMAIN = "com.microsoft"

TAKEN_AS_STANDARD = ("DequantizeLinear", "Gelu", "QuantizeLinear")
"""Operators of ONNX Runtime's domain that TensorRT's importer takes for the standard ones of the same name."""

_SMALL = 1 << 12
"""Bytes of an external tensor that shape inference may need: shapes, axes, splits."""

_NOT_CONSTANT = ("RandomNormal", "RandomUniform", "Multinomial", "If", "Loop", "Scan")
"""Operators without a deterministic result, or with graphs of their own."""


@dataclass(frozen=True, slots=True)
class ValueType:
    """What is known of a value.

    Attributes:
        elem: A `TensorProto` data type; 0 when unknown.
        shape: One entry per axis, or None when the rank is unknown.
    """

    elem: int = TensorProto.UNDEFINED
    shape: tuple[Dimension, ...] | None = None


@dataclass(frozen=True, eq=False)
class Node:
    """A node in its graph."""

    proto: onnx.NodeProto
    scope: "Scope" = field(repr=False)

    @property
    def op(self) -> str:
        """Name of a standard operator, or of one that is taken for it; with its domain where it is of another one."""
        standard = self.proto.domain in STANDARD_DOMAINS or self.is_taken_as_standard
        return str(self.proto.op_type) if standard else self.kind

    @property
    def is_taken_as_standard(self) -> bool:
        """Whether it is of ONNX Runtime's domain, and TensorRT takes it for the standard operator of that name."""
        return self.proto.domain == ONNX_RUNTIME_DOMAIN and self.proto.op_type in TAKEN_AS_STANDARD

    @property
    def kind(self) -> str:
        """Operator with its domain, if it has one."""
        domain = "" if self.proto.domain in STANDARD_DOMAINS else f"{self.proto.domain}."
        return f"{domain}{self.proto.op_type}"

    @property
    def label(self) -> str:
        """Its name, or where it has none, which output it makes."""
        output = next((name for name in self.proto.output if name), "?")
        return str(self.proto.name) or f"(unnamed, makes {output})"

    @property
    def module(self) -> str:
        """The module that its metadata names: our exporter's key, or torch's scopes."""
        noted: dict[str, str] = {entry.key: entry.value for entry in self.proto.metadata_props}
        return noted.get("module") or _torch_module(noted.get("pkg.torch.onnx.name_scopes", ""))

    def input(self, index: int) -> str:
        """Return an input's name; empty when it is left out."""
        return self.proto.input[index] if index < len(self.proto.input) else ""

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value."""
        for attribute in self.proto.attribute:
            if attribute.name == name and not attribute.ref_attr_name:  # which the function's caller gives
                value = onnx.helper.get_attribute_value(attribute)
                return value.decode(errors="replace") if isinstance(value, bytes) else value
        return default

    def input_type(self, index: int) -> ValueType:
        """Return what is known of an input."""
        return self.scope.type_of(self.input(index))

    def constant(self, index: int) -> NDArray[Any] | None:
        """Return an input's values when they are stored in the model, readable, and not too many."""
        return self.scope.values(self.input(index)) if self.input(index) else None

    def producer(self, index: int) -> "Node | None":
        """Return the node that makes an input."""
        return self.scope.producer(self.input(index))

    def readers(self, output: int = 0) -> "list[tuple[Node, int]]":
        """Return the nodes that read an output, each with the index of its input."""
        return self.scope.readers.get(self.proto.output[output], [])


def _torch_module(scopes: str) -> str:
    """Return the module of torch's list of scopes, outermost first, whose last entry is the operator."""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    return str(names[-2]) if isinstance(names, list) and len(names) > 1 else ""


@dataclass(eq=False)
class Scope:
    """One graph: the main graph, a subgraph, or a function's body.

    Attributes:
        label: Where it is; empty for the main graph.
        readers: Value → who reads it, nodes of inner graphs included.
    """

    file: ModelFile = field(repr=False)
    label: str
    parent: "Scope | None"
    initializers: Mapping[str, TensorProto]
    inputs: Mapping[str, ValueType]
    outputs: Mapping[str, ValueType]
    types: Mapping[str, ValueType]
    nodes: list[Node] = field(default_factory=list)
    producers: dict[str, Node] = field(default_factory=dict)
    readers: dict[str, list[tuple[Node, int]]] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)

    def home(self, name: str) -> "Scope | None":
        """Return the graph that a visible value belongs to."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.initializers or name in scope.producers or name in scope.inputs:
                return scope
            scope = scope.parent
        return None

    def producer(self, name: str) -> Node | None:
        """Return the node that makes a value."""
        home = self.home(name)
        return home.producers.get(name) if home else None

    def tensor(self, name: str) -> TensorProto | None:
        """Return the stored tensor behind a value: an initializer or a Constant, also through Identity."""
        home = self.home(name)
        if home is None:
            return None
        if name in home.initializers:
            return home.initializers[name]
        node = home.producers.get(name)
        if node is not None and node.op == "Identity":
            return home.tensor(node.input(0))
        return _constant_tensor(node) if node is not None and node.op == "Constant" else None

    def values(self, name: str) -> NDArray[Any] | None:
        """Return a stored tensor's values, or None."""
        tensor = self.tensor(name)
        return None if tensor is None else self.file.values(tensor)

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on nothing but what is stored: an engine computes it while it builds."""
        home = self.home(name)
        return home is not None and (name in home.initializers or name in home.constants)

    def is_unknown(self, name: str) -> bool:
        """Whether a value is a parameter of a function or a subgraph, which may be anything."""
        home = self.home(name)
        return home is None or (bool(home.label) and name in home.inputs)

    def type_of(self, name: str) -> ValueType:
        """Return what is known of a value."""
        home = self.home(name)
        if home is None:
            return ValueType()
        tensor = home.tensor(name)
        if tensor is not None:
            return ValueType(tensor.data_type, tuple(tensor.dims))
        return home.types.get(name) or home.inputs.get(name) or ValueType()


@dataclass(frozen=True)
class GraphModel:
    """A model with all its graphs, the main one first.

    Attributes:
        functions: (domain, name) of the model's local functions.
    """

    file: ModelFile
    scopes: Sequence[Scope]
    functions: frozenset[tuple[str, str]]

    @property
    def main(self) -> Scope:
        """The main graph."""
        return self.scopes[0]

    @cached_property
    def nodes(self) -> list[Node]:
        """Every node of every graph."""
        return [node for scope in self.scopes for node in scope.nodes]

    def of(self, *ops: str) -> Iterator[Node]:
        """Yield the nodes of these standard operators."""
        return (node for node in self.nodes if node.op in ops)


def view_of(file: ModelFile) -> GraphModel:
    """Return a model with producers, readers, types and constants resolved."""
    scopes: list[Scope] = []
    _enter_graph(file, _with_types(file), "", None, scopes)
    for function in file.model.functions:
        label = f"function {function.domain}.{function.name}".replace(" .", " ")
        inputs, outputs = dict.fromkeys(function.input, ValueType()), dict.fromkeys(function.output, ValueType())
        scope = Scope(file, label, None, {}, inputs, outputs, {})
        _enter_nodes(scope, function.node, scopes)
    functions = frozenset((function.domain, function.name) for function in file.model.functions)
    return GraphModel(file, scopes, functions)


def _with_types(file: ModelFile) -> onnx.GraphProto:
    """Return the main graph with the types of inner values inferred as far as they can be."""
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    for tensor in model.graph.initializer:
        if tensor.name in file.inline:
            # Inference needs to know that there are values, elsewhere.
            tensor.data_location = TensorProto.EXTERNAL
            continue
        place = file.place(tensor)
        if place is not None and place.length is not None and place.length <= _SMALL:
            values = file.values(tensor)
            if values is not None:
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    try:
        return onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True).graph
    except Exception:  # a graph that inference cannot follow is linted with the types that it declares
        return model.graph


def _enter_graph(
    file: ModelFile, graph: onnx.GraphProto, label: str, parent: Scope | None, scopes: list[Scope]
) -> None:
    # The values of small tensors may have been replaced for inference; where tensors are stored, the file says.
    stored = file.model.graph if parent is None else graph
    scope = Scope(
        file=file,
        label=label,
        parent=parent,
        initializers={tensor.name: tensor for tensor in stored.initializer},
        inputs={value.name: _value_type(value) for value in graph.input},
        outputs={value.name: _value_type(value) for value in graph.output},
        types={value.name: _value_type(value) for value in (*graph.value_info, *graph.output)},
    )
    _enter_nodes(scope, graph.node, scopes)


def _enter_nodes(scope: Scope, nodes: Sequence[onnx.NodeProto], scopes: list[Scope]) -> None:
    scopes.append(scope)
    for proto in nodes:
        node = Node(proto, scope)
        scope.nodes.append(node)
        for index, name in enumerate(proto.input):
            if name:
                (scope.home(name) or scope).readers.setdefault(name, []).append((node, index))
        scope.producers.update({name: node for name in proto.output if name})
        if _folds(node):
            scope.constants.update(name for name in proto.output if name)
        for attribute in proto.attribute:
            graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
            for graph in graphs:
                _enter_graph(scope.file, graph, f"{node.label}/{attribute.name}", scope, scopes)


def _folds(node: Node) -> bool:
    """Whether a node's result is known when the engine is built."""
    if node.op == "Constant":
        return True
    inputs = [name for name in node.proto.input if name]
    return bool(inputs) and node.op not in _NOT_CONSTANT and all(node.scope.is_constant(name) for name in inputs)


def _value_type(value: onnx.ValueInfoProto) -> ValueType:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return ValueType(kind.elem_type)
    return ValueType(kind.elem_type, tuple(_dimension(dimension) for dimension in kind.shape.dim))


def _dimension(dimension: onnx.TensorShapeProto.Dimension) -> Dimension:
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value)
    return str(dimension.dim_param) or None


def _constant_tensor(node: Node) -> TensorProto | None:
    for attribute in node.proto.attribute:
        if attribute.name == "value":
            tensor: TensorProto = attribute.t
            return tensor
        if attribute.name in ("value_float", "value_floats"):
            numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            return onnx.numpy_helper.from_array(np.asarray(numbers, np.float32), node.label)
        if attribute.name in ("value_int", "value_ints"):
            numbers = attribute.i if attribute.name == "value_int" else list(attribute.ints)
            return onnx.numpy_helper.from_array(np.asarray(numbers, np.int64), node.label)
    return None
