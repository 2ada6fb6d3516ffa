"""Rules about matrix products with stored weights, and about the names of products."""

from collections import Counter
from collections.abc import Iterator

from onnx import TensorProto

from spike_export.engines.lint.finding import Hit, Rule
from spike_export.engines.lint.operands import (
    PRODUCTS,
    SCALE,
    ZERO_POINT,
    has_channels,
    is_int8,
    products,
    quantized_type,
    type_name,
)
from spike_export.engines.lint.view import GraphModel

_SMALLEST = 16
"""Rows or columns of a weight below which a tile of the tensor cores is not filled."""

_HALF_MAX, _INT8_PRODUCT = 65504, 127 * 127


def _input_rows(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        axis = product.weight.channel_axis
        if product.int8 and axis is not None and axis == product.weight.contraction_axis:
            yield Hit(
                "its weight has one scale per input channel, the axis that is summed over; TensorRT falls back to 16 "
                "bit without saying so, and ONNX Runtime fails, or takes them for the output's scales where there are "
                "as many",
                product.node,
            )


def _stacked(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        axis, rank = product.weight.channel_axis, product.weight.rank
        if product.int8 and axis is not None and rank is not None and rank > 2 and axis < rank - 2:
            yield Hit(
                f"its stacked weight has one scale per matrix (axis {axis} of {rank}); TensorRT falls back to 16 bit, "
                "and ONNX Runtime fails when it runs",
                product.node,
            )


def _half_scales(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        quantizers = (product.activation.quantizer, product.weight.quantizer)
        if not product.int8 or all(q is None or q.input_type(SCALE).elem != TensorProto.FLOAT16 for q in quantizers):
            continue
        weight, terms = product.weight.quantizer, product.weight.terms
        if weight is not None and has_channels(weight):
            largest = f" (up to {terms * _INT8_PRODUCT} with {terms} terms)" if terms else ""
            reason = (
                f"with float16 scales per channel TensorRT stores the integer sums{largest} in float16, which ends at "
                f"{_HALF_MAX}"
            )
        else:
            reason = "its scales are float16"
        yield Hit(f"{reason}; ONNX Runtime does not fuse the product", product.node)


def _casts(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        if product.int8 and (product.weight.has_cast or product.activation.has_cast):
            yield Hit(
                "a Cast stands between DequantizeLinear and the product; ONNX Runtime does not fuse it, and TensorRT "
                "may not",
                product.node,
            )


def _weights_only(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        if product.weight.quantizer is not None and product.activation.quantizer is None:
            kind = type_name(quantized_type(product.weight.quantizer))
            yield Hit(f"{kind} weights under a floating-point product: saves memory, not arithmetic", product.node)


def _rounded_inputs(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        weight = product.weight
        if weight.quantizer is None or product.activation.quantizer is not None or not is_int8(weight.quantizer):
            continue
        shape = weight.quantizer.input_type(0).shape
        plain = shape is not None and len(shape) == 2 and all(node.op == "Transpose" for node in weight.between)
        axis = weight.channel_axis
        if plain and (axis is None or axis != weight.contraction_axis):
            yield Hit(
                "ONNX Runtime makes a MatMulNBits of it, which rounds the other operand to INT8 as well", product.node
            )


def _activation_only(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        activation = product.activation.quantizer
        if activation is not None and product.weight.quantizer is None:
            yield Hit("only its activation is quantized: the error of INT8 without INT8 arithmetic", product.node)


def _small(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        if not product.int8 or product.weight.quantizer is None:
            continue
        shape = product.weight.quantizer.input_type(0).shape or ()
        small = [size for size in shape[-2:] if isinstance(size, int) and size < _SMALLEST]
        if small:
            yield Hit(
                f"its weight is {' x '.join(map(str, shape))}; INT8 gains nothing below {_SMALLEST}", product.node
            )


def _gemm(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        quantizers = (product.activation.quantizer, product.weight.quantizer)
        if product.node.op == "Gemm" and product.int8 and any(q and not q.input(ZERO_POINT) for q in quantizers):
            yield Hit("ONNX Runtime fuses a Gemm only where both quantizers have zero points", product.node)


def _outer_constants(model: GraphModel) -> Iterator[Hit]:
    for product in products(model):
        scope = product.node.scope
        quantizers = (product.activation.quantizer, product.weight.quantizer)
        if not product.int8 or scope.parent is None:
            continue
        names = [q.input(index) for q in quantizers if q for index in (SCALE, ZERO_POINT)]
        if product.weight.quantizer is not None:
            names.append(product.weight.quantizer.input(0))
        outer = [name for name in names if name and scope.home(name) is not scope]
        if outer:
            yield Hit(
                f"it is in a branch and its constant {outer[0]!r} in the graph around; ONNX Runtime does not fuse it",
                product.node,
            )


def _bfloat16(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(*PRODUCTS, "Attention"):
        if TensorProto.BFLOAT16 in (node.input_type(0).elem, node.input_type(1).elem):
            yield Hit(f"ONNX Runtime's CPU has no {type_name(TensorProto.BFLOAT16)} kernel for it", node)


def _product_names(model: GraphModel) -> Iterator[Hit]:
    for node in model.of(*PRODUCTS):
        if not node.proto.name:
            yield Hit("without a name the plan calls it after its output, and no audit finds it", node)
        elif "+" in node.proto.name:
            yield Hit("TensorRT joins the names of merged nodes with '+', so that no audit finds it", node)


def _duplicate_names(model: GraphModel) -> Iterator[Hit]:
    for scope in model.scopes:
        names = Counter(node.proto.name for node in scope.nodes if node.proto.name)
        seen: set[str] = set()
        for node in scope.nodes:
            name = node.proto.name
            if names[name] > 1 and name not in seen:
                seen.add(name)
                yield Hit(f"{names[name]} nodes have this name; ONNX Runtime may refuse the model", node)


PRODUCT_RULES: tuple[Rule, ...] = (
    Rule(
        "weight-scale-per-input",
        "error",
        "A weight's scales run along the axis that is summed over",
        "scale weights per output channel: axis 1 of a [in, out] weight",
        _input_rows,
    ),
    Rule(
        "stacked-weight-scale",
        "warning",
        "Stacked weights with a scale per matrix",
        "use one 2-D product per expert, or scale 1 and a multiplication behind the product",
        _stacked,
    ),
    Rule(
        "half-scales",
        "warning",
        "An INT8 product with float16 scales",
        "store float32 scales, with a Cast to float32 in front of the quantizer and one back behind the product",
        _half_scales,
    ),
    Rule(
        "cast-before-product",
        "warning",
        "A Cast between dequantizer and INT8 product",
        "dequantize in float32 and cast the product's result",
        _casts,
    ),
    Rule(
        "weights-only",
        "note",
        "Quantized weights under a floating-point product (W8A16)",
        "quantize its input too if INT8 arithmetic is meant",
        _weights_only,
    ),
    Rule(
        "weights-only-rounded",
        "note",
        "INT8 weights that ONNX Runtime turns into a product with a rounded input",
        "accept it (it is fast), or let the weight enter as a batch of one (Unsqueeze behind DequantizeLinear)",
        _rounded_inputs,
    ),
    Rule(
        "activation-only",
        "warning",
        "A product whose weight is not quantized though its input is",
        "quantize the weight, or take the quantizer away",
        _activation_only,
    ),
    Rule(
        "small-product",
        "note",
        "A quantized product of few rows or columns",
        "leave it in 16 bit",
        _small,
    ),
    Rule(
        "gemm-zero-point",
        "warning",
        "A quantized Gemm without zero points",
        "give both quantizers int8 zero points, or spell it as MatMul and Add",
        _gemm,
    ),
    Rule(
        "branch-constants",
        "warning",
        "An INT8 product in a branch whose constants are outside",
        "store weight, scales and zero points in the branch itself",
        _outer_constants,
    ),
    Rule(
        "bfloat16-on-cpu",
        "warning",
        "bfloat16 where ONNX Runtime's CPU has no kernel",
        "export in float16 or float32 to run it there; TensorRT takes it as it is",
        _bfloat16,
    ),
    Rule(
        "product-name",
        "warning",
        "A product's name cannot be found in a plan",
        "give each product a unique name without '+'",
        _product_names,
    ),
    Rule(
        "duplicate-name",
        "warning",
        "Nodes with the same name",
        "give each node a name of its own",
        _duplicate_names,
    ),
)
