"""The gated feed-forward block in torch: down(act(gate(x)) * up(x)), as a whole block or as an expert of a mixture."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from spike_export.calibration.decoder.equivalent.hadamard import transform_channels
from spike_export.checkpoint.families import Activation

ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
"""HF's name of a gate's function → the function."""


class FeedForward(nn.Module):
    """`down(act(gate(x)) * up(x))`. Source: arXiv 2002.05202, section 2.

    Args:
        linears: Name → linear.
        names: Names of gate, up and down. Where gate and up have one name, they are one linear, gate's rows first.
        activation: The gate's function.
        hadamard: Channels of a block of the Hadamard transform in front of down, whose weight has its inverse; None
            without one.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        names: tuple[str, str, str],
        activation: Activation,
        hadamard: int | None = None,
    ) -> None:
        super().__init__()
        self._names, self._hadamard = names, hadamard
        self._activation = ACTIVATIONS[activation]
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Compute [..., hidden] → [..., hidden]."""
        gate_name, up_name, down_name = self._names
        if gate_name == up_name:
            gate, up = self.get_submodule(up_name)(states).chunk(2, dim=-1)
        else:
            gate, up = self.get_submodule(gate_name)(states), self.get_submodule(up_name)(states)
        inner = self._activation(gate) * up
        if self._hadamard is not None:
            inner = transform_channels(inner, self._hadamard)
        product: torch.Tensor = self.get_submodule(down_name)(inner)
        return product
