"""Emits one linear layer as its plan says.

INT8 with a static scale (pattern P1), INT8 with a scale per token made at run time (P2), INT8 weights under a product
in the kept precision (W8A16), or weights and product in the kept precision.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.calibration.blocked_transpose import transposed_copy
from spike_export.calibration.checkpoint import Checkpoint
from spike_export.calibration.errors import CheckpointError
from spike_export.calibration.recipe import QMAX, Dtype, ModulePlan, WeightScheme
from spike_export.calibration.simulate import SMALLEST_TOKEN_AMAX
from spike_export.calibration.weight_quantization import quantize_rows
from spike_export.export.graph_builder import ELEMENT_TYPES, GraphBuilder
from spike_export.export.manifest import INT8_WEIGHTS
from spike_export.export.weight_layout import transposed_tensor

NUMPY_TYPES: Mapping[Dtype, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass
class QuantizedWeight:
    """One module's INT8 weight, read from the checkpoint and quantized when the graph is written.

    The scales are kept once known (a few kilobytes), so that writing them does not quantize a second time. Threads may
    ask for both at once.
    """

    checkpoint: Checkpoint
    module: str
    scheme: WeightScheme
    _scale: NDArray[np.float32] | None = field(default=None, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def values(self) -> NDArray[np.int8]:
        """Return [in_features, out_features] int8.

        Raises:
            CheckpointError: The weight holds NaN or infinity.
        """
        name = f"{self.module}.weight"
        height, width = self.checkpoint.stored_shape(name)
        with self._lock:
            try:
                read = self.checkpoint.row_reader(name)
                quantized, self._scale = quantize_rows((height, width), read, self.scheme)
            except ValueError as error:
                raise CheckpointError(
                    f"tensor {name}: {error}; the checkpoint is damaged, download it again"
                ) from error
            return quantized

    def scale(self) -> NDArray[np.float32]:
        """Return [out_features] float32 (per channel) or a 0-D array (per tensor)."""
        with self._lock:
            if self._scale is None:
                self.values()
            assert self._scale is not None
            return self._scale


def number_format(plan: ModulePlan) -> str:
    """Return a plan's name in manifest and graph: `int8`, `float16`, or for W8A16 `float16+int8-weights`."""
    return plan.precision + INT8_WEIGHTS if plan.precision != "int8" and plan.weights == "int8" else plan.precision


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
        scheme: How INT8 weights are scaled.
        shapes: Tensor name → shape, from the configuration; a `.bias` is emitted where it is listed.
    """

    builder: GraphBuilder
    checkpoint: Checkpoint
    plans: Mapping[str, ModulePlan]
    scheme: WeightScheme
    shapes: Mapping[str, tuple[int, ...]]
    _token_scaled: dict[str, _TokenScaled] = field(default_factory=dict, init=False, repr=False)

    def emit(self, module: str, value: ir.Value) -> ir.Value:
        """Append x @ W (+ bias).

        Args:
            module: HF name, e.g. `model.layers.0.mlp.up_proj`.
            value: [batch, sequence, in_features] in any precision; cast as needed.

        Returns:
            [batch, sequence, out_features], float32 for an INT8 module, else in the module's own precision: the
            consumer casts, so that a float32 consumer gets no round trip through 16 bit.
        """
        plan = self.plans[module]
        metadata: dict[str, str] = {"precision": number_format(plan)}
        if plan.ratio is not None:
            metadata["ratio"] = repr(plan.ratio)
        precision: Dtype = "float32" if plan.precision == "int8" else plan.precision
        value = self.builder.cast(value, ELEMENT_TYPES[precision])
        if plan.precision == "int8":
            product = self._int8_product(module, value, plan.activation_scale, metadata)
        else:
            product = self.builder.op(
                "MatMul", [value, self._weight(module, plan, metadata)], module, metadata=metadata
            )
        return self._biased(module, product, precision, metadata)

    def _int8_product(self, module: str, value: ir.Value, scale: float | None, metadata: Mapping[str, str]) -> ir.Value:
        """Append the product of an input with a static scale, or of one whose tokens have each their own."""
        tokens = self._scaled_tokens(value) if scale is None else None
        if tokens is not None:
            # The compilers take constant scales only. Tokens divided by their steps beforehand have the scale 1, and
            # a token's step, which all terms of its products have in common, is multiplied in behind the product.
            value = tokens.values
        quantized = quantize_dequantize(self.builder, module, value, 1.0 if scale is None else scale, metadata=metadata)
        weight = self._quantized_weight(module, metadata)
        product = self.builder.op("MatMul", [quantized, weight], module, metadata=metadata)
        if tokens is None:
            return product
        return self.builder.op("Mul", [product, tokens.step], module, label="token_rescale", metadata=metadata)

    def _scaled_tokens(self, value: ir.Value) -> _TokenScaled:
        """Append x / (max(max|x|, floor) / 127) per token, once for all linears that read x."""
        name = str(value.name)
        if name not in self._token_scaled:
            b, producer = self.builder, value.producer()
            # Named after what makes the tensor: no reader has more right to the nodes than its siblings.
            place, stem = ("model", name) if producer is None else (producer.metadata_props["module"], producer.name)
            label = f"{str(stem).removeprefix(place + '.')}_token"
            amax = b.op("Abs", [value], place, label=f"{label}_abs")
            keep = {"keepdims": 1}
            amax = b.op("ReduceMax", [amax, b.integers(-1)], place, label=f"{label}_amax", attributes=keep)
            amax = b.op("Max", [amax, b.float32(SMALLEST_TOKEN_AMAX)], place, label=f"{label}_amax_floored")
            step = b.op("Div", [amax, b.float32(QMAX)], place, label=f"{label}_step")
            scaled = b.op("Div", [value, step], place, label=f"{label}_scaled")
            self._token_scaled[name] = _TokenScaled(scaled, step)
        return self._token_scaled[name]

    def _weight(self, module: str, plan: ModulePlan, metadata: Mapping[str, str]) -> ir.Value:
        """Return the weight of a product in the kept precision."""
        assert plan.precision != "int8"
        if plan.weights == "int8":
            return self._restored_weight(module, plan.precision, metadata)
        return self._plain_weight(module, plan.precision)

    def _restored_weight(self, module: str, precision: Dtype, metadata: Mapping[str, str]) -> ir.Value:
        """Return an INT8 weight dequantized to the kept precision, [1, in_features, out_features]."""
        b = self.builder
        # Stored as HF does, one scale a row: ONNX Runtime dequantizes rows five times faster than columns, and takes
        # the Transpose into its float32 product.
        weight = self._quantized_weight(module, metadata, transposed=True)
        # As a batch of one: ONNX Runtime makes of DequantizeLinear and a 2-D MatMul a MatMulNBits that rounds the
        # input to INT8 too (accuracy level 4), an error of half a percent, where the input is to stay exact.
        weight = b.op("Unsqueeze", [weight, b.integers(0)], module, label="weight_unsqueezed", metadata=metadata)
        axes = {"perm": [0, 2, 1]}
        weight = b.op("Transpose", [weight], module, label="weight_transposed", metadata=metadata, attributes=axes)
        # Float32 scales and a Cast: a float16 scale has 11 bits, and ONNX Runtime dequantizes to its type only.
        return b.cast(weight, ELEMENT_TYPES[precision])

    def _quantized_weight(self, module: str, metadata: Mapping[str, str], *, transposed: bool = False) -> ir.Value:
        """Return a dequantized INT8 weight, float32: [in_features, out_features], or the other way round."""
        b = self.builder
        name, source = f"{module}.weight", QuantizedWeight(self.checkpoint, module, self.scheme)
        columns, rows = self.shapes[name]
        channels = [columns] if self.scheme == "int8-per-channel" else []
        if transposed:
            weight = b.lazy(name, ir.DataType.INT8, (columns, rows), lambda: transposed_copy(source.values(), np.int8))
        else:
            weight = b.lazy(name, ir.DataType.INT8, (rows, columns), source.values)
        scale = b.lazy(f"{module}.weight_scale", ir.DataType.FLOAT, channels, source.scale)
        zero = b.initializer(f"{module}.weight_zero_point", np.zeros(channels, np.int8))
        axis = {"axis": 0 if transposed else 1} if channels else None
        label, inputs = "DequantizeLinear_weight", [weight, scale, zero]
        return b.op(
            "DequantizeLinear", inputs, module, dtype=ir.DataType.FLOAT, label=label, metadata=metadata, attributes=axis
        )

    def _plain_weight(self, module: str, precision: Dtype) -> ir.Value:
        name = f"{module}.weight"
        columns, rows = self.shapes[name]

        def read() -> NDArray[Any]:
            return transposed_tensor(self.checkpoint, name, NUMPY_TYPES[precision])

        return self.builder.lazy(name, ELEMENT_TYPES[precision], (rows, columns), read)

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
    metadata: Mapping[str, str] | None = None,
) -> ir.Value:
    """Append a symmetric per-tensor INT8 round trip with a static scale.

    Args:
        builder: The graph.
        module: HF path that the nodes and initializers are named after.
        value: Any shape, float32.
        scale: The step.
        stem: What is quantized, where a module has several such tensors; part of the names.
        metadata: Further entries of the nodes' `metadata_props`.

    Returns:
        The restored values, float32.
    """
    # Every consumer has a pair and a zero point of its own: ONNX Runtime does not fuse a pair shared by several
    # products, and merges duplicated pairs unless their zero points are different initializers.
    step = builder.initializer(f"{module}.{stem}_scale", np.array(scale, np.float32))
    zero = builder.initializer(f"{module}.{stem}_zero_point", np.array(0, np.int8))
    for kind, dtype in (("QuantizeLinear", ir.DataType.INT8), ("DequantizeLinear", ir.DataType.FLOAT)):
        label = None if stem == "input" else f"{stem}_{kind}"
        value = builder.op(kind, [value, step, zero], module, dtype=dtype, label=label, metadata=metadata)
    return value
