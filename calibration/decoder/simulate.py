"""The quantized model simulated in torch, computing what the exported graph computes.

A quantized linear sees its input rounded to INT8 or FP8 with a static scale, or with each token's own, saturated like
ONNX QuantizeLinear, and a weight that went through `quantize_weight`; the product is float32, as in the graph.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spike_export.artifacts.recipe import LARGEST, AttentionPlan, KvCachePlan, ModulePlan, NumberFormat, WeightScheme
from spike_export.calibration.decoder.kv_cache import cache_steps, cached
from spike_export.calibration.decoder.weight_quantization import quantize_weight
from spike_export.checkpoint.modules import split_name

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

SMALLEST_TOKEN_AMAX = 1e-5
"""Floor of a token's largest magnitude, so that a token of zeros has a scale to divide by."""


@dataclass(frozen=True)
class QuantizedWeights:
    """8-bit weights of one model's linears, made on first use and kept, so that many simulations share them.

    Attributes:
        scheme: How the weights are scaled.
        keep: Whether to keep them; a model that is not resident is quantized anew in each pass.
    """

    scheme: WeightScheme
    keep: bool = True
    _known: "dict[tuple[str, NumberFormat], tuple[torch.Tensor, torch.Tensor]]" = field(
        default_factory=dict, repr=False
    )

    def dequantized(
        self,
        module: str,
        weight: "torch.Tensor",
        factors: "torch.Tensor | None" = None,
        number_format: NumberFormat = "int8",
    ) -> "torch.Tensor":
        """Return `weight` [out_features, in_features] after its round trip through 8 bits, float32.

        `factors` [in_features] multiply the weight's columns first; they are the same in every call for a module.
        """
        import torch

        key = (module, number_format)
        if key not in self._known:
            plain = weight.detach().float()
            quantized, scale = quantize_weight(
                (plain if factors is None else plain * factors).cpu().numpy(), self.scheme, number_format
            )
            # torch takes numpy's integers only. Stored [in_features, out_features]; transposed, in torch's layout.
            values = torch.from_numpy(quantized.view("i1"))
            values = values if number_format == "int8" else values.view(torch.float8_e4m3fn)
            entry = (values.T, torch.from_numpy(scale.reshape(-1, 1)))
            if not self.keep:
                return _product(*entry).to(weight.device)
            self._known[key] = entry
        return _product(*self._known[key]).to(weight.device)


def _product(quantized: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    import torch

    return quantized.to(torch.float32).mul_(scale)


def fake_quantize(values: "torch.Tensor", scale: float, number_format: NumberFormat = "int8") -> "torch.Tensor":
    """Return `values` after a round trip through 8 bits with a static per-tensor scale (half to even, saturating)."""
    return _rounded(values / scale, number_format).mul_(scale)


def fake_quantize_tokens(values: "torch.Tensor", number_format: NumberFormat = "int8") -> "torch.Tensor":
    """Return `values` [..., channels] after a round trip through 8 bits with a scale per token.

    A token's scale is its abs-max / 127, or / 448 for FP8.
    """
    scale = values.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST_TOKEN_AMAX) / LARGEST[number_format]
    return _rounded(values / scale, number_format).mul_(scale)


def _rounded(scaled: "torch.Tensor", number_format: NumberFormat) -> "torch.Tensor":
    """Return float32 values, changed in place or not, rounded to those of the format."""
    import torch

    if number_format == "int8":
        return scaled.round_().clamp_(-128, 127)
    # Saturated beforehand: torch's conversion makes NaN of what lies outside.
    largest = LARGEST[number_format]
    return scaled.clamp_(-largest, largest).to(torch.float8_e4m3fn).to(torch.float32)


@dataclass(frozen=True)
class Simulation:
    """What to quantize, for `Decoder.run` to visit.

    Attributes:
        modules: Linear → its plan; linears that are not named stay as they are.
        weights: 8-bit weights of the same model.
        attention: Attention block → steps of its operands; blocks that are not named stay as they are.
        smoothing: Representative module → scales of its input's channels, divided out of the input and multiplied into
            the weight right here. The folded model computes the same with weights that are scaled per channel, where
            the producing rows' own scales take up what is folded into them.
        kv_cache: Attention block → steps of its keys and values in the cache; blocks that are not named stay as they
            are.
        prefix_cached: Whether the cache holds the prefix, whose keys and values are rounded then too.
    """

    modules: Mapping[str, ModulePlan]
    weights: QuantizedWeights
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)
    smoothing: "Mapping[str, NDArray[np.float32]]" = field(default_factory=dict)
    kv_cache: Mapping[str, KvCachePlan] = field(default_factory=dict)
    prefix_cached: bool = True

    @contextmanager
    def visit(self, index: int, layer: "nn.Module") -> "Iterator[None]":
        """Within the block, the layer computes as the graph does."""
        with ExitStack() as stack:
            for name, plan in self.modules.items():
                number, inner = split_name(name)
                if number == index and (plan.number_format or plan.weights):
                    linear: Any = layer.get_submodule(inner)
                    stack.enter_context(_forward(linear, self._linear(name, linear, plan)))
            block, module = f"model.layers.{index}.self_attn", layer.get_submodule("self_attn")
            attention, cache = self.attention.get(block), self.kv_cache.get(block)
            if attention is not None:
                stack.enter_context(_operands(module, attention))
            if cache is not None:
                stack.enter_context(_caching(module, block, cache, exact_prefix=not self.prefix_cached))
            yield

    def _linear(self, name: str, linear: Any, plan: ModulePlan) -> "Callable[[torch.Tensor], torch.Tensor]":
        import torch

        scales = self.smoothing.get(name)
        factors = None if scales is None else torch.from_numpy(scales).to(linear.weight.device)
        kind = plan.number_format
        weight = self.weights.dequantized(name, linear.weight, factors, kind or "int8")
        bias = None if linear.bias is None else linear.bias.float()

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            values = inputs.float() if factors is None else inputs.float() / factors
            if kind is not None:
                scale = plan.static_scale
                values = fake_quantize_tokens(values, kind) if scale is None else fake_quantize(values, scale, kind)
            return torch.nn.functional.linear(values, weight, bias).to(inputs.dtype)

        return forward


@contextmanager
def _forward(linear: Any, forward: "Callable[[torch.Tensor], torch.Tensor]") -> Iterator[None]:
    linear.forward = forward
    try:
        yield
    finally:
        # The instance attribute shadowed the class's forward; removing it restores that.
        del linear.forward


@contextmanager
def _operands(attention: Any, plan: AttentionPlan) -> Iterator[None]:
    import torch

    def quantized(query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        before = key.shape[2] - query.shape[2]
        cached = ((key, plan.key), (value, plan.value))
        # The prefix's keys and values are cached in full precision and never meet a quantizer.
        joined = [
            torch.cat([states[:, :, :before], fake_quantize(states[:, :, before:], scale)], dim=2)
            for states, scale in cached
        ]
        return (fake_quantize(query, plan.query), *joined)

    attention.operands = quantized
    try:
        yield
    finally:
        attention.operands = None


@contextmanager
def _caching(attention: Any, block: str, plan: KvCachePlan, *, exact_prefix: bool) -> Iterator[None]:
    import torch

    def rounded(query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        steps = cache_steps(block, plan, key.shape[1], key.shape[3])
        before = key.shape[2] - query.shape[2] if exact_prefix else 0
        joined = [
            torch.cat([states[:, :, :before], cached(states[:, :, before:], step)], dim=2)
            for states, step in ((key, steps.key), (value, steps.value))
        ]
        return (query, *joined)

    attention.operands = rounded
    try:
        yield
    finally:
        attention.operands = None
