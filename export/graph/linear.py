"""Emits one linear layer as its plan says.

INT8 or FP8 with a static scale (pattern P1), or with a scale per token made at run time (P2), INT8 weights under a
product in the kept precision (W8A16), or weights and product in the kept precision.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.manifest import INT8_WEIGHTS
from spike_export.artifacts.recipe import LARGEST, Dtype, ModulePlan, NumberFormat, WeightScheme
from spike_export.calibration.decoder.simulate import SMALLEST_TOKEN_AMAX
from spike_export.calibration.decoder.weight_quantization import ELEMENTS, quantize_rows
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.row_blocks import BlockReader
from spike_export.export.graph.graph_builder import ELEMENT_TYPES, GraphBuilder
from spike_export.export.graph.weight_layout import read_matrix

NUMPY_TYPES: Mapping[Dtype, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_STORED: Mapping[NumberFormat, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclass
class QuantizedWeight:
    """One module's 8-bit weight, read from the checkpoint and quantized when the graph is written.

    Its columns are multiplied by `column_factors` [in_features] first, where there are any.

    The scales are kept once known (a few kilobytes), so that writing them does not quantize a second time. Threads may
    ask for both at once.

    Attributes:
        transposed: Whether the graph has it as [in_features, out_features]; as [out_features, in_features] otherwise.
    """

    checkpoint: Checkpoint
    module: str
    scheme: WeightScheme
    number_format: NumberFormat
    transposed: bool
    column_factors: NDArray[np.float32] | None
    _scale: NDArray[np.float32] | None = field(default=None, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def fill(self, out: NDArray[Any]) -> None:
        """Write the weight in the number format.

        Raises:
            CheckpointError: The weight holds NaN or infinity.
        """
        name = f"{self.module}.weight"
        with self._lock, self.checkpoint.block_reader(name) as read:
            try:
                read = self._multiplied(read)
                self._scale = quantize_rows(out, read, self.scheme, self.number_format, transposed=self.transposed)
            except ValueError as error:
                raise CheckpointError(
                    f"tensor {name}: {error}; the checkpoint is damaged, download it again"
                ) from error

    def _multiplied(self, read: BlockReader) -> BlockReader:
        factors = self.column_factors
        if factors is None:
            return read

        def multiplied(rows: slice, out: NDArray[Any]) -> None:
            read(rows, out)
            out *= factors

        return multiplied

    def scale(self) -> NDArray[np.float32]:
        """Return [out_features] float32 (per channel) or a 0-D array (per tensor)."""
        with self._lock:
            if self._scale is None:
                shape = self.checkpoint.stored_shape(f"{self.module}.weight")
                self.fill(np.empty(shape[::-1] if self.transposed else shape, ELEMENTS[self.number_format]))
            assert self._scale is not None
            return self._scale


def number_format(plan: ModulePlan) -> str:
    """Return a plan's name in manifest and graph: `int8`, `fp8`, `float16`, or for W8A16 `float16+int8-weights`."""
    return plan.precision + INT8_WEIGHTS if plan.number_format is None and plan.weights == "int8" else plan.precision


@dataclass(frozen=True)
class _TokenScaled:
    """A tensor [..., channels] divided by the steps of its tokens [..., 1]; both float32."""

    values: ir.Value
    step: ir.Value


@dataclass(frozen=True)
class LinearEmitter:
    """Turns module names into nodes.

    Attributes:
        plans: Module name → its plan.
        scheme: How 8-bit weights are scaled.
        shapes: Tensor name → shape, from the configuration; a `.bias` is emitted where it is listed.
        exact_inputs: Whether products of INT8 weights alone see their inputs as they are, in every engine.
        column_factors: Quantized module → factors [in_features] of its weight's columns, where it has any.
    """

    builder: GraphBuilder
    checkpoint: Checkpoint
    plans: Mapping[str, ModulePlan]
    scheme: WeightScheme
    shapes: Mapping[str, tuple[int, ...]]
    exact_inputs: bool = True
    column_factors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    _token_scaled: dict[tuple[str, NumberFormat], _TokenScaled] = field(default_factory=dict, init=False, repr=False)

    def emit(self, module: str, value: ir.Value) -> ir.Value:
        """Append x @ W (+ bias).

        Args:
            module: HF name, e.g. `model.layers.0.mlp.up_proj`.
            value: [batch, sequence, in_features] in any precision; cast as needed.

        Returns:
            [batch, sequence, out_features], float32 for a quantized module, else in the module's own precision: the
            consumer casts, so that a float32 consumer gets no round trip through 16 bit.
        """
        plan = self.plans[module]
        metadata: dict[str, str] = {"precision": number_format(plan)}
        if plan.ratio is not None:
            metadata["ratio"] = repr(plan.ratio)
        precision = plan.product_dtype
        value = self.builder.cast(value, ELEMENT_TYPES[precision])
        if plan.number_format is not None:
            product = self._quantized_product(module, value, plan, plan.number_format, metadata)
        else:
            product = self.builder.op(
                "MatMul", [value, self._weight(module, plan, metadata)], module, metadata=metadata
            )
        return self._biased(module, product, precision, metadata)

    def _quantized_product(
        self,
        module: str,
        value: ir.Value,
        plan: ModulePlan,
        number_format: NumberFormat,
        metadata: Mapping[str, str],
    ) -> ir.Value:
        """Append the product of an input with a static scale, or of one whose tokens have each their own."""
        scale = plan.static_scale
        tokens = self._scaled_tokens(value, number_format) if scale is None else None
        if tokens is not None:
            # The compilers take constant scales only. Tokens divided by their steps beforehand have the scale 1, and
            # a token's step, which all terms of its products have in common, is multiplied in behind the product.
            value = tokens.values
        step = 1.0 if scale is None else scale
        quantized = quantize_dequantize(
            self.builder, module, value, step, number_format=number_format, metadata=metadata
        )
        if number_format == "int8":
            weight = self._quantized_weight(module, metadata)
        else:
            # ONNX Runtime would take a DequantizeLinear beside a MatMul for INT8 and then refuse the model.
            weight = self._restored_weight(module, "float32", metadata, number_format)
        product = self.builder.op("MatMul", [quantized, weight], module, metadata=metadata)
        if tokens is None:
            return product
        return self.builder.op("Mul", [product, tokens.step], module, label="token_rescale", metadata=metadata)

    def _scaled_tokens(self, value: ir.Value, number_format: NumberFormat) -> _TokenScaled:
        """Append x / (max(max|x|, floor) / largest magnitude) per token, once for all linears that read x."""
        name = str(value.name)
        key = (name, number_format)
        if key not in self._token_scaled:
            b, producer = self.builder, value.producer()
            # Named after what makes the tensor: no reader has more right to the nodes than its siblings.
            place, stem = ("model", name) if producer is None else (producer.metadata_props["module"], producer.name)
            kind = "token" if number_format == "int8" else f"token_{number_format}"
            label = f"{str(stem).removeprefix(place + '.')}_{kind}"
            keep = {"keepdims": 1}
            with b.beside(value):
                amax = b.op("Abs", [value], place, label=f"{label}_abs")
                amax = b.op("ReduceMax", [amax, b.integers(-1)], place, label=f"{label}_amax", attributes=keep)
                amax = b.op("Max", [amax, b.float32(SMALLEST_TOKEN_AMAX)], place, label=f"{label}_amax_floored")
                step = b.op("Div", [amax, b.float32(LARGEST[number_format])], place, label=f"{label}_step")
                scaled = b.op("Div", [value, step], place, label=f"{label}_scaled")
            self._token_scaled[key] = _TokenScaled(scaled, step)
        return self._token_scaled[key]

    def _weight(self, module: str, plan: ModulePlan, metadata: Mapping[str, str]) -> ir.Value:
        """Return the weight of a product in the kept precision."""
        if plan.weights == "int8":
            return self._restored_weight(module, plan.product_dtype, metadata)
        return self._plain_weight(module, plan.product_dtype)

    def _restored_weight(
        self, module: str, precision: Dtype, metadata: Mapping[str, str], number_format: NumberFormat = "int8"
    ) -> ir.Value:
        """Return an 8-bit weight dequantized to a precision, [in_features, out_features] or a batch of one."""
        b = self.builder
        if not self.exact_inputs:
            return b.cast(self._quantized_weight(module, metadata), ELEMENT_TYPES[precision])
        # Stored as HF does, one scale a row: ONNX Runtime dequantizes rows five times faster than columns, and takes
        # the Transpose into its float32 product.
        weight = self._quantized_weight(module, metadata, number_format, transposed=False)
        # As a batch of one: ONNX Runtime makes of DequantizeLinear and a 2-D MatMul a MatMulNBits that rounds the
        # input to INT8 too (accuracy level 4), an error of half a percent, where the input is to stay exact.
        weight = b.op("Unsqueeze", [weight, b.integers(0)], module, label="weight_unsqueezed", metadata=metadata)
        axes = {"perm": [0, 2, 1]}
        weight = b.op("Transpose", [weight], module, label="weight_transposed", metadata=metadata, attributes=axes)
        # Float32 scales and a Cast: a float16 scale has 11 bits, and ONNX Runtime dequantizes to its type only.
        return b.cast(weight, ELEMENT_TYPES[precision])

    def _quantized_weight(
        self,
        module: str,
        metadata: Mapping[str, str],
        number_format: NumberFormat = "int8",
        *,
        transposed: bool = True,
    ) -> ir.Value:
        """Return a dequantized 8-bit weight, float32: [in_features, out_features], or the other way round."""
        b, stored = self.builder, _STORED[number_format]
        name = f"{module}.weight"
        factors = self.column_factors.get(module)
        source = QuantizedWeight(self.checkpoint, module, self.scheme, number_format, transposed, factors)
        shape = self.shapes[name]
        channels = [shape[0]] if self.scheme == "int8-per-channel" else []
        weight = b.streamed(name, stored, shape[::-1] if transposed else shape, source.fill)
        scale = b.lazy(f"{module}.weight_scale", ir.DataType.FLOAT, channels, source.scale)
        zero = b.initializer(f"{module}.weight_zero_point", np.zeros(channels, ELEMENTS[number_format]))
        axis = {"axis": 1 if transposed else 0} if channels else None
        label, inputs = "DequantizeLinear_weight", [weight, scale, zero]
        return b.op(
            "DequantizeLinear", inputs, module, dtype=ir.DataType.FLOAT, label=label, metadata=metadata, attributes=axis
        )

    def _plain_weight(self, module: str, precision: Dtype) -> ir.Value:
        name = f"{module}.weight"
        columns, rows = self.shapes[name]
        fill = partial(read_matrix, self.checkpoint, name, transposed=True)
        return self.builder.streamed(name, ELEMENT_TYPES[precision], (rows, columns), fill)

    def _biased(self, module: str, product: ir.Value, precision: Dtype, metadata: Mapping[str, str]) -> ir.Value:
        name = f"{module}.bias"
        if name not in self.shapes:
            return product

        def read() -> NDArray[Any]:
            return self.checkpoint.tensor(name).astype(NUMPY_TYPES[precision], copy=False)

        bias = self.builder.lazy(name, ELEMENT_TYPES[precision], self.shapes[name], read)
        return self.builder.op("Add", [product, bias], module, metadata=metadata)


def quantize_dequantize(
    builder: GraphBuilder,
    module: str,
    value: ir.Value,
    scale: float,
    *,
    stem: str = "input",
    number_format: NumberFormat = "int8",
    metadata: Mapping[str, str] | None = None,
) -> ir.Value:
    """Append a symmetric per-tensor round trip through 8 bits with a static scale.

    Args:
        builder: The graph.
        module: HF path that the nodes and initializers are named after.
        value: Any shape, float32.
        scale: The step, for FP8 the scale.
        stem: What is quantized, where a module has several such tensors; part of the names.
        number_format: What is rounded to; values outside its range saturate.
        metadata: Further entries of the nodes' `metadata_props`.

    Returns:
        The restored values, float32.
    """
    # Every consumer has a pair and a zero point of its own: ONNX Runtime does not fuse a pair shared by several
    # products, and merges duplicated pairs unless their zero points are different initializers.
    step = builder.initializer(f"{module}.{stem}_scale", np.array(scale, np.float32))
    zero = builder.initializer(f"{module}.{stem}_zero_point", np.array(0, ELEMENTS[number_format]))
    for kind, dtype in (("QuantizeLinear", _STORED[number_format]), ("DequantizeLinear", ir.DataType.FLOAT)):
        label = None if stem == "input" else f"{stem}_{kind}"
        value = builder.op(kind, [value, step, zero], module, dtype=dtype, label=label, metadata=metadata)
    return value
