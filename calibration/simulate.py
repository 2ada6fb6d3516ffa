"""The quantized model simulated in torch, computing what the exported graph computes.

A quantized linear sees round(x / s) * s with a static per-tensor scale, saturated like ONNX QuantizeLinear, and a
weight that went through `quantize_weight`; the product is float32, as in the graph.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from spike_export.calibration.recipe import WeightScheme
from spike_export.calibration.reference_model import ReferenceModel
from spike_export.calibration.weight_quantization import quantize_weight

if TYPE_CHECKING:
    import torch


class QuantizedWeights:
    """INT8 weights of a model's linears, made on first use and kept, so that many simulations share them."""

    def __init__(self, model: ReferenceModel, scheme: WeightScheme) -> None:
        self._model = model
        self._scheme = scheme
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def dequantized(self, module: str) -> "torch.Tensor":
        """Return the weight [out_features, in_features] float32 after its round trip through INT8."""
        import torch

        if module not in self._known:
            quantized, scale = quantize_weight(self._model.linear(module).weight.detach().numpy(), self._scheme)
            # Stored [in_features, out_features]; the transposed view is torch's layout.
            self._known[module] = (torch.from_numpy(quantized).T, torch.from_numpy(scale.reshape(-1, 1)))
        quantized_weight, weight_scale = self._known[module]
        return quantized_weight.to(torch.float32).mul_(weight_scale)


def fake_quantize(values: "torch.Tensor", scale: float) -> "torch.Tensor":
    """Return `values` after a round trip through INT8 with a static per-tensor scale (half to even, saturating)."""
    return (values / scale).round_().clamp_(-128, 127).mul_(scale)


@contextmanager
def simulated(model: ReferenceModel, scales: Mapping[str, float], weights: QuantizedWeights) -> Iterator[None]:
    """Within the block, the linears named in `scales` run as INT8 with that activation scale; others are untouched."""
    with ExitStack() as stack:
        for name, scale in scales.items():
            stack.enter_context(_quantized_forward(model, name, scale, weights))
        yield


@contextmanager
def _quantized_forward(model: ReferenceModel, name: str, scale: float, weights: QuantizedWeights) -> Iterator[None]:
    import torch

    linear = model.linear(name)

    def forward(inputs: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.linear(fake_quantize(inputs, scale), weights.dequantized(name), linear.bias)

    replaced: Any = linear
    replaced.forward = forward
    try:
        yield
    finally:
        # The instance attribute shadowed the class's forward; removing it restores that.
        del replaced.forward
