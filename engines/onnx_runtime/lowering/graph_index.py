"""Who makes and who uses each value of a graph."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


@dataclass(frozen=True)
class GraphIndex:
    """Nodes and initializers of a graph by the names of their values.

    Attributes:
        producers: Value → the node that makes it.
        users: Value → the nodes that read it.
        initializers: Name → tensor; its data may lie in another file.
    """

    graph: onnx.GraphProto
    producers: dict[str, onnx.NodeProto] = field(init=False)
    users: dict[str, list[onnx.NodeProto]] = field(init=False)
    initializers: dict[str, onnx.TensorProto] = field(init=False)

    def __post_init__(self) -> None:
        """Build the index."""
        users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in values_read(node):
                users[name].append(node)
        object.__setattr__(self, "producers", {name: node for node in self.graph.node for name in node.output})
        object.__setattr__(self, "users", dict(users))
        object.__setattr__(self, "initializers", {tensor.name: tensor for tensor in self.graph.initializer})

    def producer(self, value: str, *operators: str) -> onnx.NodeProto | None:
        """Return the node that makes a value, if it is of one of some operators."""
        node = self.producers.get(value)
        return node if node is not None and node.op_type in operators else None

    def only_user(self, value: str, operator: str) -> onnx.NodeProto | None:
        """Return the node that reads a value, if it is the only one and of an operator."""
        users = self.users.get(value, [])
        return users[0] if len(users) == 1 and users[0].op_type == operator else None

    def small_constant(self, name: str) -> NDArray[np.generic] | None:
        """Return an initializer whose data lie in the graph itself."""
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)


def values_read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the values that a node reads, those that its branches take from around it included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from values_read(inner)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes whose values nobody reads, and inputs and initializers that only those read."""
    places = {name: place for place, node in enumerate(graph.node) for name in node.output}
    wanted, kept, used = [value.name for value in graph.output], set[int](), set[str]()
    while wanted:
        place = places.get(wanted.pop())
        if place is not None and place not in kept:
            kept.add(place)
            read = list(values_read(graph.node[place]))
            used.update(read)
            wanted.extend(read)
    for place in reversed(range(len(graph.node))):
        if place not in kept:
            del graph.node[place]
    _keep(graph.input, lambda value: value.name in used)
    _keep(graph.initializer, lambda tensor: tensor.name in used)


def _keep(items: Any, is_kept: Callable[[Any], bool]) -> None:
    for place in reversed(range(len(items))):
        if not is_kept(items[place]):
            del items[place]
