"""Writes an ONNX graph node by node on onnx-ir: stable unique names, Hugging Face initializer names, lazy weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.artifacts.recipe import Dtype

OPSET = 24
IR_VERSION = 11

ELEMENT_TYPES: Mapping[Dtype, ir.DataType] = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}

Dimensions = Sequence[int | str]

Attribute = int | float | str | Sequence[int] | ir.Graph


@dataclass
class _Scope:
    """What one graph holds so far: the model's, or that of a branch."""

    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        """Return the finished graph."""
        opsets = {"": OPSET}
        return ir.Graph(
            inputs, outputs, nodes=self.nodes, initializers=self.initializers, opset_imports=opsets, name=name
        )


class StreamedTensor(ir.LazyTensor):
    """A weight that is made when it is asked for, in memory that may have held another one before.

    Attributes:
        fill: Writes the weight to an array of its shape and type.
    """

    __slots__ = ("fill",)

    def __init__(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], fill: Callable[[NDArray[Any]], None]
    ) -> None:
        super().__init__(self._made, dtype, ir.Shape(shape), cache=False, name=name)
        self.fill = fill

    def _made(self) -> ir.Tensor[NDArray[Any]]:
        out = np.empty(self.shape.numpy(), self.dtype.numpy())
        self.fill(out)
        return ir.Tensor(out, name=self.name)


class GraphBuilder:
    """Collects nodes and initializers in execution order.

    A node is named `<module>.<label>`, so that one node more or less leaves every other name as it is. Names are
    unique and hold no `+`, which TensorRT uses to join the names of merged layers. Values know their element type
    but no shape: ONNX Runtime and TensorRT infer shapes themselves. Weights stay in the branch that uses them, because
    ONNX Runtime fuses quantized products with the weights of the same graph only.
    """

    def __init__(self) -> None:
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._scopes = [_Scope()]  # the branches under construction, innermost last
        self._depths: dict[str, int] = {}
        self._nodes: set[str] = set()
        self._initializers: dict[str, ir.Value] = {}
        self._casts: dict[tuple[str, ir.DataType], ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Dimensions) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, shape: Dimensions) -> None:
        """Declare `value` a graph output; the name it was emitted with is the output's."""
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Add a small constant that is held in memory until the graph is written."""
        # An ndarray even for a 0-D value: onnx-ir accepts numpy scalars here and fails only when it saves.
        array = np.asarray(array)
        return self._add_initializer(name, ir.Tensor(array, name=name), array.shape)

    def lazy(self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], NDArray[Any]]) -> ir.Value:
        """Add a small weight that `read` produces each time it is needed and that is never kept."""

        def tensor() -> ir.Tensor[NDArray[Any]]:
            return ir.Tensor(read(), name=name)

        lazy = ir.LazyTensor(tensor, dtype, ir.Shape(shape), cache=False, name=name)
        return self._add_initializer(name, lazy, shape)

    def streamed(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], fill: Callable[[NDArray[Any]], None]
    ) -> ir.Value:
        """Add a weight that `fill` writes to memory each time it is needed and that is never kept."""
        return self._add_initializer(name, StreamedTensor(name, dtype, shape, fill), shape)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return the small constant of this name, which all graphs share, and which therefore is in the outermost."""
        if name not in self._initializers:
            scopes, self._scopes = self._scopes, self._scopes[:1]
            self.initializer(name, array)
            self._scopes = scopes
        return self._initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """Return the 1-D int64 constant of these values; equal constants are one initializer."""
        name = "integers." + ".".join(str(value) for value in values)
        return self.constant(name, np.array(values, np.int64))

    def integer(self, value: int) -> ir.Value:
        """Return the 0-D int64 constant of this value."""
        name = f"integer.{value}"
        return self.constant(name, np.array(value, np.int64))

    def float32(self, value: float) -> ir.Value:
        """Return the 0-D float32 constant of this value."""
        return self.number(value, np.dtype(np.float32))

    def number(self, value: float, dtype: np.dtype[Any]) -> ir.Value:
        """Return the 0-D constant of this value in a floating-point type."""
        return self.constant(f"{dtype.name}.{float(value)!r}", np.array(value, dtype))

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        module: str,
        *,
        dtype: ir.DataType | None = None,
        label: str | None = None,
        output: str | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> ir.Value:
        """Append a node and return its one output.

        Args:
            kind: ONNX operator.
            module: HF path of the module the node belongs to.
            dtype: Element type of the output; that of the first input when omitted.
            label: Distinguishes nodes of one kind within a module; the operator's name when omitted.
            output: Name of the output value; derived from the node's name when omitted.
            attributes: The operator's attributes.
            metadata: Further entries of the node's `metadata_props`.

        Raises:
            ValueError: The node's name is taken, or holds a `+`.
        """
        name = f"{module}.{label or kind}"
        if name in self._nodes or "+" in name:
            raise ValueError(f"node name {name!r} is taken or not allowed")
        result = ir.Value(name=output or f"{name}.output", type=ir.TensorType(dtype or element_type(inputs[0])))
        properties = {"module": module, **(metadata or {})}
        node = ir.node(kind, inputs, attributes, outputs=[result], name=name, metadata_props=properties)
        self._nodes.add(name)
        self._scopes[-1].nodes.append(node)
        self._depths[str(result.name)] = len(self._scopes) - 1
        return result

    def conditional(
        self, condition: ir.Value, then: Callable[[], ir.Value], otherwise: ir.Value, module: str
    ) -> ir.Value:
        """Append an If: what `then` emits, with its initializers, is a branch of its own.

        Args:
            condition: 0-D bool.
            then: Emits the branch's nodes and returns its value.
            otherwise: What there is when the condition does not hold; of the same element type.
            module: HF path of the module that is computed or not.
        """
        self._scopes.append(_Scope())
        result = then()
        computed = self._scopes.pop().graph([], [result], f"{module}.then")
        self._scopes.append(_Scope())
        kept = self.op("Identity", [otherwise], module)
        left_out = self._scopes.pop().graph([], [kept], f"{module}.else")
        branches = {"then_branch": computed, "else_branch": left_out}
        return self.op("If", [condition], module, dtype=element_type(result), attributes=branches)

    @contextmanager
    def beside(self, value: ir.Value) -> Iterator[None]:
        """Within the block, nodes go to the graph that `value` is in: what they yield serves other branches too."""
        scopes, depth = self._scopes, self._depths.get(str(value.name), 0)
        self._scopes = scopes[: depth + 1]
        try:
            yield
        finally:
            self._scopes = scopes

    def top_k(self, value: ir.Value, count: int, module: str) -> tuple[ir.Value, ir.Value]:
        """Append the largest `count` elements of the last axis: (values, largest first; their indices, int64).

        Raises:
            ValueError: The module has such a node already.
        """
        values = self.op("TopK", [value, self.integers(count)], module, attributes={"axis": -1})
        node = values.producer()
        assert node is not None
        node.resize_outputs(2)
        indices = node.outputs[1]
        indices.name, indices.type = f"{node.name}.indices", ir.TensorType(ir.DataType.INT64)
        return values, indices

    def cast(self, value: ir.Value, dtype: ir.DataType, output: str | None = None) -> ir.Value:
        """Return `value` in `dtype`: itself when it already is, and one Cast for all consumers otherwise."""
        if element_type(value) == dtype:
            return value
        key = (str(value.name), dtype)
        if key not in self._casts:
            producer = value.producer()
            if producer is None:
                raise ValueError(f"graph input {value.name!r} is not cast")
            properties, label = producer.metadata_props, f"{_label(producer)}_to_{dtype.name.lower()}"
            with self.beside(value):
                self._casts[key] = self.op(
                    "Cast",
                    [value],
                    properties["module"],
                    dtype=dtype,
                    label=label,
                    output=output,
                    metadata=properties,
                    attributes={"to": dtype.value},
                )
        return self._casts[key]

    def model(self, name: str, producer: str, version: str) -> ir.Model:
        """Return the finished model."""
        graph = self._scopes[0].graph(self._inputs, self._outputs, name)
        return ir.Model(graph, ir_version=IR_VERSION, producer_name=producer, producer_version=version)

    def _add_initializer(self, name: str, tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.Value:
        if name in self._initializers:
            raise ValueError(f"initializer name {name!r} is taken")
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
        self._initializers[name] = value
        self._scopes[-1].initializers.append(value)
        return value


def element_type(value: ir.Value) -> ir.DataType:
    """Return a value's element type."""
    if value.dtype is None:
        raise ValueError(f"value {value.name!r} has no element type")
    return value.dtype


def _label(node: ir.Node) -> str:
    return str(node.name).removeprefix(node.metadata_props["module"] + ".")
