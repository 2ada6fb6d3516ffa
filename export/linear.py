"""Emits one linear layer as its plan says: INT8 with its own quantizer, or a plain product in the kept precision."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spike_export.calibration.checkpoint import Checkpoint
from spike_export.calibration.errors import CheckpointError
from spike_export.calibration.recipe import Dtype, ModulePlan, WeightScheme
from spike_export.calibration.weight_quantization import quantize_weight
from spike_export.export.graph_builder import ELEMENT_TYPES, GraphBuilder

NUMPY_TYPES: Mapping[Dtype, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass
class QuantizedWeight:
    """One module's INT8 weight, read from the checkpoint and quantized when the graph is written.

    The scales are kept once known (a few kilobytes), so that writing them does not quantize a second time.
    """

    checkpoint: Checkpoint
    module: str
    scheme: WeightScheme
    _scale: NDArray[np.float32] | None = field(default=None, init=False)

    def values(self) -> NDArray[np.int8]:
        """Return [in_features, out_features] int8.

        Raises:
            CheckpointError: The weight holds NaN or infinity.
        """
        try:
            quantized, self._scale = quantize_weight(self.checkpoint.tensor(f"{self.module}.weight"), self.scheme)
        except ValueError as error:
            raise CheckpointError(
                f"tensor {self.module}.weight: {error}; the checkpoint is damaged, download it again"
            ) from error
        return quantized

    def scale(self) -> NDArray[np.float32]:
        """Return [out_features] float32 (per channel) or a 0-D array (per tensor)."""
        if self._scale is None:
            self.values()
        assert self._scale is not None
        return self._scale


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
        metadata: dict[str, str] = {"precision": plan.precision}
        if plan.ratio is not None:
            metadata["ratio"] = repr(plan.ratio)
        precision: Dtype = "float32" if plan.precision == "int8" else plan.precision
        value = self.builder.cast(value, ELEMENT_TYPES[precision])
        if plan.precision == "int8":
            assert plan.activation_scale is not None
            value = self._quantized_input(module, value, plan.activation_scale, metadata)
            weight = self._quantized_weight(module, metadata)
        else:
            weight = self._plain_weight(module, precision)
        product = self.builder.op("MatMul", [value, weight], module, metadata=metadata)
        return self._biased(module, product, precision, metadata)

    def _quantized_input(self, module: str, value: ir.Value, scale: float, metadata: Mapping[str, str]) -> ir.Value:
        # Every consumer has a pair and a zero point of its own: ONNX Runtime does not fuse a pair shared by several
        # products, and merges duplicated pairs unless their zero points are different initializers.
        b = self.builder
        step = b.initializer(f"{module}.input_scale", np.array(scale, np.float32))
        zero = b.initializer(f"{module}.input_zero_point", np.array(0, np.int8))
        value = b.op("QuantizeLinear", [value, step, zero], module, dtype=ir.DataType.INT8, metadata=metadata)
        return b.op("DequantizeLinear", [value, step, zero], module, dtype=ir.DataType.FLOAT, metadata=metadata)

    def _quantized_weight(self, module: str, metadata: Mapping[str, str]) -> ir.Value:
        b = self.builder
        name, source = f"{module}.weight", QuantizedWeight(self.checkpoint, module, self.scheme)
        columns, rows = self.shapes[name]
        channels = [columns] if self.scheme == "int8-per-channel" else []
        weight = b.lazy(name, ir.DataType.INT8, (rows, columns), source.values)
        scale = b.lazy(f"{module}.weight_scale", ir.DataType.FLOAT, channels, source.scale)
        zero = b.initializer(f"{module}.weight_zero_point", np.zeros(channels, np.int8))
        axis = {"axis": 1} if channels else None
        label, inputs = "DequantizeLinear_weight", [weight, scale, zero]
        return b.op(
            "DequantizeLinear", inputs, module, dtype=ir.DataType.FLOAT, label=label, metadata=metadata, attributes=axis
        )

    def _plain_weight(self, module: str, precision: Dtype) -> ir.Value:
        name = f"{module}.weight"
        columns, rows = self.shapes[name]

        def read() -> NDArray[Any]:
            return np.ascontiguousarray(self.checkpoint.tensor(name).astype(NUMPY_TYPES[precision], copy=False).T)

        return self.builder.lazy(name, ELEMENT_TYPES[precision], (rows, columns), read)

    def _biased(self, module: str, product: ir.Value, precision: Dtype, metadata: Mapping[str, str]) -> ir.Value:
        name = f"{module}.bias"
        if name not in self.shapes:
            return product

        def read() -> NDArray[Any]:
            return self.checkpoint.tensor(name).astype(NUMPY_TYPES[precision], copy=False)

        bias = self.builder.lazy(name, ELEMENT_TYPES[precision], self.shapes[name], read)
        return self.builder.op("Add", [product, bias], module, metadata=metadata)
