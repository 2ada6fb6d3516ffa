"""A model in torch whose every part reads what a graph's part read, so that an error shows where it arises."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spike_export.engines.onnx_runtime.taps import EMBEDDED, Station, Values

_FIRST_LAYER = "model.layers.0"

LAMBDA = 8.0
"""How many standard deviations of the sum's rounding error are allowed; more happens once in 1e13 sums.
Source: Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019, theorem 2.4."""

_HALF_ULP = 2.0**-24
"""Unit roundoff of float32."""


@dataclass(frozen=True, slots=True)
class Product:
    """How a graph rounds one linear's operands and result.

    Attributes:
        eight_bits: Whether an operand is rounded to 8 bits, which doubles a magnitude at most.
        roundoff: Unit roundoff of the precision in which the graph computes the product.
    """

    eight_bits: bool
    roundoff: float

    def tolerance(self, linear: nn.Module, values: torch.Tensor) -> torch.Tensor:
        """Return by how much two sound results may differ, element by element.

        With u float32's roundoff, K terms and v the product's own roundoff: 2 lambda sqrt(K) u sum |x| |w| of summing
        up in two orders, and 3 v sum |x| |w| of rounding input, weight and result, where v is a 16-bit format's.
        """
        weight: Any = linear.weight
        bias: Any = getattr(linear, "bias", None)
        magnitude: torch.Tensor = nn.functional.linear(values.abs(), weight.abs(), None if bias is None else bias.abs())
        if self.eight_bits:
            magnitude = 4 * magnitude
        coarse = self.roundoff > _HALF_ULP
        share = 2 * LAMBDA * weight.shape[1] ** 0.5 * _HALF_ULP + (3 * self.roundoff if coarse else 0.0)
        tolerance: torch.Tensor = share * magnitude
        if coarse:  # what float16 cannot hold as a normal number
            tolerance += 2.0**-24 * (values.abs().sum(-1, keepdim=True) + 1)
        return tolerance


@dataclass
class Forcing:
    """Keeps what a torch model computes at stations, and lets the model go on with a graph's values instead.

    Attributes:
        values: The graph's values; empty where the model goes on with its own.
        products: Linear → how its product is rounded; only with `values`.
        nudges: Station → relative change of the values that the model goes on with, of random sign; 0 for none.
        skipped: Tokens in front (a prefix) that the graph's values do not have.
        computed: What the model computed.
        tolerances: Of the linears' outputs.
    """

    values: Values = field(default_factory=dict)
    products: Mapping[str, Product] = field(default_factory=dict)
    nudges: Mapping[Station, float] = field(default_factory=dict)
    skipped: int = 0
    computed: dict[Station, NDArray[np.float32]] = field(default_factory=dict)
    tolerances: dict[Station, NDArray[np.float32]] = field(default_factory=dict)
    _draw: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    @contextmanager
    def on(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within the block, watch modules by their HF names: linears, and layers."""
        with ExitStack() as stack:
            for name, module in modules.items():
                for handle in self._hooks(name, module):
                    stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        if "weight" in module._parameters:  # a linear, or a router, which is of a class of its own in transformers
            yield module.register_forward_pre_hook(lambda _, inputs: self._input(Station(name, "input"), *inputs))
        if name == _FIRST_LAYER:
            yield module.register_forward_pre_hook(lambda _, inputs: self._input(EMBEDDED, *inputs))
        yield module.register_forward_hook(lambda module, inputs, output: self._output(name, module, inputs, output))

    def _input(self, station: Station, values: torch.Tensor, *others: Any) -> tuple[Any, ...]:
        return (self._passed(station, values), *others)

    def _output(self, name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        station = Station(name, "output")
        if name in self.products:
            tolerance = self.products[name].tolerance(module, inputs[0])
            self.tolerances[station] = self._windows(station, tolerance)[:, self.skipped :].numpy()
        if isinstance(output, tuple):
            return (self._passed(station, output[0]), *output[1:])
        return self._passed(station, output)

    def _windows(self, station: Station, values: torch.Tensor) -> torch.Tensor:
        """Return a step's values as [windows, tokens, channels]; a router's tokens are flat."""
        return values.reshape(len(self.values[station]), -1, values.shape[-1])

    def _passed(self, station: Station, values: torch.Tensor) -> torch.Tensor:
        """Keep a value; return what the model goes on with."""
        if station not in self.values:
            self.computed[station] = values[:, self.skipped :].float().numpy().copy()
            return values
        forced = torch.from_numpy(self.values[station].astype(np.float32)).to(values.dtype)
        windows = self._windows(station, values)
        self.computed[station] = windows[:, self.skipped :].float().numpy().copy()
        forced = torch.cat([windows[:, : self.skipped], forced], dim=1).view_as(values)
        nudge = self.nudges.get(station, 0.0)
        if nudge:
            signs = torch.randint(0, 2, forced.shape, generator=self._draw) * 2 - 1
            forced = forced * (1 + nudge * signs)
        return forced
