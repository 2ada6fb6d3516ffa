"""What every part of the graph is written with: the builder, the weights, the plan."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import DecoderConfig, tensor_shapes
from spike_export.export.graph.graph_builder import ELEMENT_TYPES, GraphBuilder
from spike_export.export.graph.linear import NUMPY_TYPES, LinearEmitter
from spike_export.export.graph_plan import GraphPlan


@dataclass(frozen=True)
class Emission:
    """One graph under construction."""

    builder: GraphBuilder
    checkpoint: Checkpoint
    plan: GraphPlan

    @property
    def config(self) -> DecoderConfig:
        """The decoder."""
        return self.checkpoint.config

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the residual stream and of all that is not quantized."""
        return ELEMENT_TYPES[self.plan.dtype]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The same for arrays."""
        return NUMPY_TYPES[self.plan.dtype]

    @cached_property
    def linears(self) -> LinearEmitter:
        """Writes the decoder's linears."""
        shapes = tensor_shapes(self.config)
        return LinearEmitter(self.builder, self.checkpoint, self.plan.modules, self.plan.weights, shapes)

    def number(self, value: float) -> ir.Value:
        """Return the 0-D constant of this value in the graph's precision."""
        return self.builder.number(value, self.numpy_dtype)

    def cast(self, value: ir.Value) -> ir.Value:
        """Return a value in the graph's precision."""
        return self.builder.cast(value, self.dtype)
