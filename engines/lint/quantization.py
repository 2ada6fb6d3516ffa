"""Rules about single quantizers: scales, zero points, types, and who reads them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from onnx import TensorProto

from spike_export.engines.lint.finding import Hit, Rule
from spike_export.engines.lint.operands import (
    DEFAULT_AXIS,
    DEQUANTIZE,
    PRODUCTS,
    QUANTIZE,
    SCALE,
    ZERO_POINT,
    has_channels,
    is_int8,
    operand,
    quantized_type,
    type_name,
)
from spike_export.engines.lint.operators import MISSING
from spike_export.engines.lint.view import STANDARD_DOMAINS, GraphModel, Node

_ACCEPTED = frozenset(
    {TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1, TensorProto.UNDEFINED}
)
"""Quantized types of TensorRT."""

_NEAR = 0.01
"""Relative difference up to which scales of one tensor are meant to be equal."""


def _quantizers(model: GraphModel) -> Iterator[Node]:
    return model.of(QUANTIZE, DEQUANTIZE)


def _pair_of(quantizer: Node) -> Sequence[Node]:
    """Return the DequantizeLinear nodes that read a QuantizeLinear."""
    return [node for node, index in quantizer.readers() if node.op == DEQUANTIZE and index == 0]


def _made_by_quantizer(node: Node) -> bool:
    """Whether a DequantizeLinear restores what a QuantizeLinear made, which is judged in its place."""
    producer = node.producer(0)
    return producer is not None and producer.op == QUANTIZE


def _scales(model: GraphModel) -> Iterator[Hit]:
    for node in _quantizers(model):
        values = node.constant(SCALE)
        if values is None or values.dtype.kind not in "fV" or not values.size:
            continue
        numbers = values.astype(np.float32)
        wrong = ~(np.isfinite(numbers) & (numbers > 0))
        if wrong.any():
            first = numbers.reshape(-1)[wrong.reshape(-1)][0]
            number = "its scale" if numbers.size == 1 else f"{int(wrong.sum())} of its {numbers.size} scales"
            yield Hit(f"{number} {'is' if numbers.size == 1 else 'are, like this one,'} {first:g}", node)


def _scale_at_run_time(model: GraphModel) -> Iterator[Hit]:
    for node in _quantizers(model):
        name = node.input(SCALE)
        if not node.scope.is_constant(name) and not node.scope.is_unknown(name):
            yield Hit(f"its scale {name!r} is computed, or given, at run time; its product falls back to 16 bit", node)


def _zero_point_values(model: GraphModel) -> Iterator[Hit]:
    for node in _quantizers(model):
        values = node.constant(ZERO_POINT)
        if values is None or values.dtype.kind not in "iufV":
            continue
        numbers = values.astype(np.float32).reshape(-1)
        if numbers.any():
            yield Hit(
                f"its zero point is {numbers[np.flatnonzero(numbers)[0]]:g}; TensorRT quantizes symmetrically only",
                node,
            )


def _zero_point_at_run_time(model: GraphModel) -> Iterator[Hit]:
    for node in _quantizers(model):
        name = node.input(ZERO_POINT)
        if name and not node.scope.is_constant(name) and not node.scope.is_unknown(name):
            yield Hit(f"its zero point {name!r} is no constant", node)


def _types(model: GraphModel) -> Iterator[Hit]:
    for node in _quantizers(model):
        elem = quantized_type(node)
        judged = elem not in _ACCEPTED and elem != TensorProto.INT32
        if not judged or (node.op == DEQUANTIZE and _made_by_quantizer(node)):
            continue
        if node.op == QUANTIZE and not node.input(ZERO_POINT) and elem == TensorProto.UINT8:
            reason = "without zero point and output_dtype it makes uint8, which cuts negative values off"
        else:
            reason = f"its quantized type is {type_name(elem)}"
        yield Hit(f"{reason}; TensorRT computes in int8 with other limits, or refuses", node)


def _int32(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(DEQUANTIZE):
        if node.input_type(0).elem == TensorProto.INT32:
            yield Hit("it restores an int32 tensor, a quantized bias", node)


def _activation_channels(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(QUANTIZE):
        name = node.input(0)
        if not node.scope.is_constant(name) and not node.scope.is_unknown(name) and has_channels(node):
            yield Hit("it has several scales on an activation; its product falls back to 16 bit", node)


def _scale_counts(model: GraphModel) -> Iterator[Hit]:
    for node in _quantizers(model):
        data, scale = node.input_type(0).shape, node.input_type(SCALE).shape
        if data is None or scale is None or len(scale) != 1 or scale[0] == 1 or node.attribute("block_size", 0):
            continue
        axis = int(node.attribute("axis", DEFAULT_AXIS))
        if not -len(data) <= axis < len(data):
            yield Hit(f"its scales run along axis {axis} of a tensor of {len(data)}", node)
        elif isinstance(scale[0], int) and isinstance(data[axis], int) and scale[0] != data[axis]:
            yield Hit(f"it has {scale[0]} scales for the {data[axis]} channels of axis {axis}", node)


def _int8_blocks(model: GraphModel) -> Iterator[Hit]:
    for node in _quantizers(model):
        block = int(node.attribute("block_size", 0))
        if block and quantized_type(node) == TensorProto.INT8:
            yield Hit(f"it scales INT8 in blocks of {block}", node)


def _types_of_input_and_scale(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(QUANTIZE):
        value, scale = node.input_type(0).elem, node.input_type(SCALE).elem
        if value and scale and value != scale:
            yield Hit(
                f"its input is {type_name(value)} and its scale {type_name(scale)}; ONNX Runtime's CPU fails there",
                node,
            )


def _restored_type(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(DEQUANTIZE):
        wanted, scale = int(node.attribute("output_dtype", 0)), node.input_type(SCALE).elem
        if wanted and scale and wanted != scale:
            yield Hit(
                f"it restores {type_name(wanted)} with scales in {type_name(scale)}; that costs a kernel, and ONNX "
                "Runtime fuses no such product",
                node,
            )


def _scalars(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(QUANTIZE):
        if node.input_type(0).shape == () and not node.scope.is_constant(node.input(0)):
            yield Hit("its input is a scalar (0-D)", node)


def _constant_consumers(model: GraphModel) -> Iterator[Hit]:
    for node in model.nodes:
        for index, name in enumerate(node.proto.input):
            tensor = node.scope.tensor(name) if name else None
            if tensor is None or tensor.data_type != TensorProto.INT8:
                continue
            if node.op == DEQUANTIZE or (node.op == QUANTIZE and index == ZERO_POINT) or node.op == "Identity":
                continue
            if node.op in MISSING or node.proto.domain not in STANDARD_DOMAINS:
                continue  # is a finding itself
            yield Hit(f"it reads the quantized constant {name!r}; only DequantizeLinear may", node)


def _missing_zero_points(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(QUANTIZE):
        if not node.input(ZERO_POINT) and int(node.attribute("output_dtype", 0)) == TensorProto.INT8:
            yield Hit("it has no zero point, and ONNX Runtime then fuses none of its products", node)


def _product_readers(node: Node) -> list[Node]:
    """Return the products that read a DequantizeLinear directly, on either side."""
    return [reader for reader, _ in node.readers() if reader.op in PRODUCTS]


def _shared(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(QUANTIZE):
        if node.scope.is_constant(node.input(0)) or not is_int8(node):
            continue
        readers = [reader for restored in _pair_of(node) for reader in _product_readers(restored)]
        if len(readers) > 1:
            names = ", ".join(reader.label for reader in readers[:3]) + (", ..." if len(readers) > 3 else "")
            yield Hit(f"{len(readers)} products share it ({names}); ONNX Runtime fuses none of them", node)


def _siblings(model: GraphModel) -> Iterator[list[Node]]:
    """Yield the quantizers of one tensor whose results go to products, where there are several."""
    groups: dict[tuple[int, str], list[Node]] = defaultdict(list)
    for node in model.of(QUANTIZE):
        judged = is_int8(node) and not node.scope.is_constant(node.input(0))
        if judged and any(_product_readers(restored) for restored in _pair_of(node)):
            groups[id(node.scope), node.input(0)].append(node)
    return (group for group in groups.values() if len(group) > 1)


def _scale_bits(node: Node) -> bytes | None:
    values = node.constant(SCALE)
    return None if values is None else values.tobytes()


def _merged(model: GraphModel) -> Iterator[Hit]:
    for group in _siblings(model):
        alike: dict[tuple[bytes | None, str], list[Node]] = defaultdict(list)
        for node in group:
            alike[_scale_bits(node), node.input(ZERO_POINT)].append(node)
        for (bits, _), nodes in alike.items():
            if bits is not None and len(nodes) > 1:
                yield Hit(
                    f"{len(nodes)} equal quantizers of {nodes[0].input(0)!r} have one zero point in common; ONNX "
                    "Runtime merges them, and fuses none of their products",
                    nodes[0],
                )


def _sibling_spread(group: Sequence[Node]) -> tuple[float, float] | None:
    """Return the smallest and the largest scale of one tensor's quantizers, or None where all are equal."""
    scales = {bits: node.constant(SCALE) for node in group if (bits := _scale_bits(node)) is not None}
    numbers = [float(values.reshape(-1)[0]) for values in scales.values() if values is not None and values.size == 1]
    return (min(numbers), max(numbers)) if len(scales) > 1 and len(numbers) == len(scales) else None


def _sibling_scales(model: GraphModel, *, near: bool) -> Iterator[Hit]:
    for group in _siblings(model):
        spread = _sibling_spread(group)
        if spread is not None and (spread[1] - spread[0] <= _NEAR * abs(spread[1])) is near:
            yield Hit(
                f"the quantizers of {group[0].input(0)!r} have scales from {spread[0]!r} to {spread[1]!r}; TensorRT "
                "merges only products whose scales are equal to the last bit",
                group[0],
            )


def _almost_equal_scales(model: GraphModel) -> Iterator[Hit]:
    return _sibling_scales(model, near=True)


def _different_scales(model: GraphModel) -> Iterator[Hit]:
    return _sibling_scales(model, near=False)


def _different_kinds(model: GraphModel) -> Iterator[Hit]:
    """Yield quantizers of tokens that were divided by their own step, where others read the undivided tensor."""
    feeding = [node for node in model.of(QUANTIZE) if any(_product_readers(restored) for restored in _pair_of(node))]
    static = {(id(node.scope), node.input(0)): node for node in feeding}
    for node in feeding:
        divided = node.producer(0)
        if divided is None or divided.op != "Div" or divided.scope.is_constant(divided.input(1)):
            continue
        sibling = static.get((id(node.scope), divided.input(0)))
        if sibling is not None:
            yield Hit(
                f"it divides each token of {divided.input(0)!r} by a step of its own, and {sibling.label!r} has one "
                "scale for all; TensorRT merges only products with one and the same input",
                node,
            )


def _residual(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(QUANTIZE):
        added = node.producer(0)
        if added is None or added.op != "Add":
            continue
        if any(added.scope.is_constant(name) for name in added.proto.input):
            continue  # a bias
        readers = [reader for restored in _pair_of(node) for reader, _ in restored.readers()]
        others = [reader for reader in readers if reader.op not in (*PRODUCTS, "Conv")]
        if others:
            yield Hit(
                f"it rounds the residual stream: {others[0].label!r} ({others[0].kind}) reads the sum only through it",
                node,
            )


def _attention_products(model: GraphModel) -> Iterator[Hit]:
    for node in model.of("MatMul"):
        sides = [operand(node, index) for index in (0, 1)]
        if all(side.quantizer is not None and not side.stored for side in sides):
            yield Hit("both operands are quantized activations; TensorRT then does not fuse the attention", node)


QUANTIZER_RULES: tuple[Rule, ...] = (
    Rule(
        "scale-not-positive",
        "error",
        "A scale is zero, negative, infinite or NaN",
        "make every scale finite and positive; give channels of zeros the scale 1",
        _scales,
    ),
    Rule(
        "scale-at-run-time",
        "warning",
        "A scale is computed at run time",
        "divide by the scale in front of a quantizer of constant scale 1, and multiply behind the product",
        _scale_at_run_time,
    ),
    Rule(
        "zero-point-not-zero",
        "error",
        "A zero point is not zero",
        "quantize symmetrically: zero points 0, type int8",
        _zero_point_values,
    ),
    Rule(
        "zero-point-at-run-time",
        "error",
        "A zero point is computed at run time",
        "store an int8 zero as initializer",
        _zero_point_at_run_time,
    ),
    Rule(
        "quantized-type",
        "error",
        "A quantized type that TensorRT lacks",
        "give the quantizer an int8 zero point of 0, or a float8e4m3fn one",
        _types,
    ),
    Rule(
        "int32-bias",
        "error",
        "A bias is quantized to int32",
        "keep the bias in floating point (onnxruntime: QuantizeBias=False)",
        _int32,
    ),
    Rule(
        "activation-scale-per-channel",
        "warning",
        "An activation has a scale per channel",
        "use one scale for the tensor, and move the channels' differences into the weights",
        _activation_channels,
    ),
    Rule(
        "scale-count",
        "error",
        "Another number of scales than channels",
        "give each channel of the axis one scale, or the tensor one",
        _scale_counts,
    ),
    Rule(
        "int8-blocks",
        "error",
        "INT8 with a scale per block",
        "use one scale per output channel; TensorRT has blocks for FP4, FP8 and INT4 only, ONNX Runtime fails",
        _int8_blocks,
    ),
    Rule(
        "input-and-scale-types",
        "warning",
        "A quantizer's input and scale have different types",
        "cast the input to float32 and keep float32 scales",
        _types_of_input_and_scale,
    ),
    Rule(
        "restored-type",
        "warning",
        "A dequantizer's result is not of its scale's type",
        "let output_dtype be the scale's type, and cast behind the product",
        _restored_type,
    ),
    Rule(
        "scalar-quantized",
        "warning",
        "A scalar is quantized",
        "leave it in floating point, or give it one axis; TensorRT's documentation forbids it",
        _scalars,
    ),
    Rule(
        "quantized-constant-reader",
        "error",
        "A quantized constant feeds something else than DequantizeLinear",
        "dequantize first and gather, transpose or reshape behind: the compiler moves that onto the int8 data",
        _constant_consumers,
    ),
    Rule(
        "zero-point-missing",
        "warning",
        "A quantizer without zero point",
        "give each quantizer an int8 zero as initializer of its own",
        _missing_zero_points,
    ),
    Rule(
        "shared-quantizer",
        "warning",
        "One quantizer feeds several products",
        "give each product a QuantizeLinear/DequantizeLinear pair and an int8 zero-point initializer of its own",
        _shared,
    ),
    Rule(
        "merged-quantizers",
        "warning",
        "Equal quantizers of one tensor share their zero point",
        "give each its own int8 zero-point initializer; TensorRT merges the products nevertheless",
        _merged,
    ),
    Rule(
        "sibling-scales",
        "warning",
        "Quantizers of one tensor have almost equal scales",
        "give them the very same scale, to the last bit",
        _almost_equal_scales,
    ),
    Rule(
        "sibling-scales-apart",
        "note",
        "Quantizers of one tensor have different scales",
        "give them the largest of their scales, if they need not differ",
        _different_scales,
    ),
    Rule(
        "sibling-kinds",
        "note",
        "Some quantizers of a tensor have a constant scale, others one per token",
        "give all linears that read the tensor the same kind of scale, if they need not differ",
        _different_kinds,
    ),
    Rule(
        "residual-quantized",
        "warning",
        "The residual stream is quantized",
        "quantize behind the norm, at the inputs of products only",
        _residual,
    ),
    Rule(
        "attention-products-quantized",
        "warning",
        "Both operands of an attention product are quantized",
        "leave attention's products in 16 bit",
        _attention_products,
    ),
)
