"""The Hadamard transform of what `down_proj` reads: blocks of channels, each multiplied by one orthogonal matrix.

The input of `down_proj` is a product of two activations, whose few largest channels take the whole range of an INT8
scale. The transform spreads each of them over the channels of its block. No weight in front can take it up, because
the product stands between; the columns of `down_proj` take up its inverse, which is the same matrix.
Source: QuaRot (arXiv 2404.00456), "online Hadamard transform"; in blocks, so that it costs little.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import HadamardPlan

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

LARGEST_BLOCK = 64
"""Channels of a block. The transform has this many multiply-accumulates for each channel: 3 % of a layer's linears in
SmolLM2-135M, 0.4 % in a LLaMA-2-7B. A block spreads a channel's magnitude by the square root of its size."""


def hadamard_plan(channels: int) -> HadamardPlan | None:
    """Return the transform of inputs with so many channels; None where they are an odd number."""
    block = min(channels & -channels, LARGEST_BLOCK)
    return HadamardPlan(block=block) if block > 1 else None


@lru_cache(maxsize=8)
def hadamard_matrix(block: int) -> Floats:
    """Return the orthogonal matrix [block, block] of Sylvester's construction; it is symmetric, and its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(block), np.float32)


def transform_columns(weight: Floats, block: int) -> None:
    """Multiply the columns of a weight [..., in_features] by the matrix, block by block, in place.

    By additions in a fixed order (the fast Walsh-Hadamard transform): a product of a library may sum otherwise for
    another number of rows, and the weight's bits would depend on how many are read at a time.
    """
    values, half = weight, 1
    while half < block:
        pairs = values.reshape(-1, block // (2 * half), 2, half)
        values = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
        half *= 2
    np.multiply(values.reshape(weight.shape), np.float32(1 / np.sqrt(block)), out=weight)


def transform_channels(values: "torch.Tensor", block: int) -> "torch.Tensor":
    """Return activations [..., channels] multiplied by the matrix, block by block, in float32; of the same dtype."""
    import torch

    matrix = torch.from_numpy(hadamard_matrix(block)).to(values.device)
    blocks = values.float().reshape(*values.shape[:-1], -1, block)
    return (blocks @ matrix).reshape(values.shape).to(values.dtype)
