"""What stands behind the operands of matrix products: quantizers, stored weights, and what lies between."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from spike_export.engines.lint.view import GraphModel, Node

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = ("MatMul", "Gemm")

SCALE, ZERO_POINT = 1, 2
"""Inputs of both quantizing operators."""

_PASSED_THROUGH = ("Transpose", "Cast", "Unsqueeze", "Squeeze", "Identity", "Reshape")
"""Operators that may stand between a quantizer and its product."""

DEFAULT_AXIS = 1
"""Of both quantizing operators."""


@dataclass(frozen=True, eq=False)
class Operand:
    """One operand of a product.

    Attributes:
        index: 0 for the left one, 1 for the right one.
        between: The nodes from the product upwards to the quantizer or constant.
        quantizer: The DequantizeLinear it comes from, or None.
        stored: Whether it is a weight: its data are known when the engine is built.
    """

    product: Node
    index: int
    between: tuple[Node, ...]
    quantizer: Node | None
    stored: bool

    @property
    def has_cast(self) -> bool:
        """Whether a Cast stands between quantizer and product."""
        return any(node.op == "Cast" for node in self.between)

    @property
    def channel_axis(self) -> int | None:
        """The product's axis that the weight's scales run along; None for one scale, or where it cannot be told."""
        if self.quantizer is None or not has_channels(self.quantizer):
            return None
        shape = self.quantizer.input_type(0).shape
        if shape is None:
            return None
        axis = int(self.quantizer.attribute("axis", DEFAULT_AXIS)) % max(len(shape), 1)
        for node in reversed(self.between):
            moved = _moved(node, axis)
            if moved is None:
                return None
            axis = moved
        return axis

    @property
    def contraction_axis(self) -> int | None:
        """The axis of this operand that the product sums over."""
        if self.product.op == "Gemm":
            transposed = bool(self.product.attribute("transB" if self.index else "transA", 0))
            return int(transposed) if self.index else int(not transposed)
        rank = self.rank
        if rank is None:
            return None
        return max(rank - 2, 0) if self.index else rank - 1

    @property
    def terms(self) -> int | None:
        """How many products are summed up to one result."""
        axis, shape = self.contraction_axis, self.product.input_type(self.index).shape
        size = shape[axis] if shape is not None and axis is not None and axis < len(shape) else None
        return size if isinstance(size, int) else None

    @property
    def rank(self) -> int | None:
        """Number of the operand's axes as the product sees it."""
        shape = self.product.input_type(self.index).shape
        if shape is None and self.quantizer is not None:
            # Inference stops at what it does not know; a chain that keeps the rank still tells.
            shape = self.quantizer.input_type(0).shape
            changed = [node for node in self.between if node.op not in ("Transpose", "Cast", "Identity")]
            if changed:
                return None
        return None if shape is None else len(shape)


def _moved(node: Node, axis: int) -> int | None:
    """Return where a node puts an axis of its input."""
    if node.op in ("Cast", "Identity"):
        return axis
    shape = node.input_type(0).shape
    if node.op == "Transpose":
        order = node.attribute("perm")
        if order is None:
            return None if shape is None else len(shape) - 1 - axis
        return list(order).index(axis) if axis in order else None
    axes = node.constant(1)
    if node.op == "Unsqueeze" and axes is not None and shape is not None:
        added = {int(value) % (len(shape) + axes.size) for value in axes.reshape(-1)}
        return [place for place in range(len(shape) + axes.size) if place not in added][axis]
    if node.op == "Squeeze" and axes is not None and shape is not None:
        removed = {int(value) % len(shape) for value in axes.reshape(-1)}
        return None if axis in removed else axis - sum(gone < axis for gone in removed)
    return None


def operand(product: Node, index: int) -> Operand:
    """Return what stands behind an operand."""
    between: list[Node] = []
    name, scope = product.input(index), product.scope
    while True:
        node = scope.producer(name)
        if node is None or node.op not in _PASSED_THROUGH:
            break
        between.append(node)
        name, scope = node.input(0), node.scope
    quantizer = node if node is not None and node.op == DEQUANTIZE else None
    return Operand(product, index, tuple(between), quantizer, scope.is_constant(name))


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product with a stored weight.

    Attributes:
        activation: The other operand.
    """

    node: Node
    activation: Operand
    weight: Operand

    @property
    def int8(self) -> bool:
        """Whether both operands come from quantizers, so that INT8 arithmetic is meant."""
        return all(side.quantizer is not None and is_int8(side.quantizer) for side in (self.activation, self.weight))


def products(model: GraphModel) -> Iterator[Product]:
    """Yield the products of one stored weight and one activation."""
    for node in model.of(*PRODUCTS):
        left, right = operand(node, 0), operand(node, 1)
        if left.stored != right.stored:
            yield Product(node, right, left) if left.stored else Product(node, left, right)


def quantized_type(node: Node) -> int:
    """Return the quantized type of a QuantizeLinear or DequantizeLinear; 0 when unknown."""
    if node.op == DEQUANTIZE:
        return node.input_type(0).elem or node.input_type(ZERO_POINT).elem
    if node.input(ZERO_POINT):
        return node.input_type(ZERO_POINT).elem
    return int(node.attribute("output_dtype", 0)) or TensorProto.UINT8


def is_int8(node: Node) -> bool:
    """Whether a quantizer is of 8 bit integers, as far as is known; not of FP8, INT4 or FP4."""
    return quantized_type(node) in (TensorProto.INT8, TensorProto.UINT8, TensorProto.UNDEFINED)


def has_channels(node: Node) -> bool:
    """Whether a quantizer has more than one scale."""
    shape = node.input_type(SCALE).shape
    if not shape:
        return False
    sizes = [size for size in shape if isinstance(size, int)]
    return len(sizes) < len(shape) or int(np.prod(sizes)) > 1


def type_name(elem: int) -> str:
    """Return an element type as ONNX names it."""
    known = TensorProto.DataType.items()
    return next((name.lower() for name, value in known if value == elem), "unknown")
