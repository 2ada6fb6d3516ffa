"""Hadamard transforms of what linears read: blocks of channels, multiplied by one orthogonal matrix.

A few large channels take the whole range of an INT8 scale. The transform spreads each of them over the channels of its
block, and the columns of the linears that read them take up its inverse, which is the same matrix. In front of the
linears of attention and feed-forward blocks, and of `down_proj`, it is computed at run time: their inputs are scaled
channel by channel, or products of two activations, and no weight in front can take the transform up. Attention sums the
channels of a value head over the tokens: there `v_proj` takes it up, and it costs nothing.
Source: QuaRot (arXiv 2404.00456), the "online Hadamard transform" and the transform of values; in blocks.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import HadamardPlan
from spike_export.checkpoint.decoder_config import DecoderConfig

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]

LARGEST_BLOCK = 64
"""Channels of a block. The transform has this many multiply-accumulates for each channel: 3 % of a layer's linears in
SmolLM2-135M, 0.4 % in a LLaMA-2-7B. A block spreads a channel's magnitude by the square root of its size."""

_AT_ONCE = 1 << 16
"""Elements of a weight that are transformed at a time, so that they stay in a processor's cache."""


def hadamard_plan(channels: int) -> HadamardPlan | None:
    """Return the transform of inputs with so many channels; None where they are an odd number."""
    block = min(channels & -channels, LARGEST_BLOCK)
    return HadamardPlan(block=block) if block > 1 else None


def value_block(config: DecoderConfig) -> int | None:
    """Return the channels of a block that rotates value heads, the largest that a head holds; None for an odd number.

    The weights take it up, so that a large block costs no more than a small one.
    """
    block = config.head_dim & -config.head_dim
    return block if block > 1 else None


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
    step = max(1, _AT_ONCE // weight[0].size)
    for first in range(0, len(weight), step):
        rows = weight[first : first + step]
        # Turned, so that an addition runs over many values that lie one behind the other.
        rows[...] = _transformed(np.ascontiguousarray(rows.reshape(-1, block).T)).T.reshape(rows.shape)


def transform_rows(weight: Floats, block: int) -> None:
    """Multiply the matrix by the rows of a weight [out_features, ...], block by block, in place; a bias likewise."""
    for first in range(0, len(weight), block):
        rows = weight[first : first + block]
        rows[...] = _transformed(rows.reshape(block, -1)).reshape(rows.shape)


def _transformed(values: Floats) -> Floats:
    """Return the matrix times values [block, count]."""
    block, found, half = len(values), values, 1
    for _ in range(block.bit_length() - 1):
        pairs = found.reshape(-1, 2, half, values.shape[1])
        changed = np.empty_like(pairs)
        np.add(pairs[:, 0], pairs[:, 1], out=changed[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=changed[:, 1])
        found, half = changed.reshape(values.shape), 2 * half
    return found * np.float32(1 / np.sqrt(block))


def transform_channels(values: "torch.Tensor", block: int) -> "torch.Tensor":
    """Return activations [..., channels] multiplied by the matrix, block by block, in float32; of the same dtype."""
    import torch

    matrix = torch.from_numpy(hadamard_matrix(block)).to(values.device)
    blocks = values.float().reshape(*values.shape[:-1], -1, block)
    return (blocks @ matrix).reshape(values.shape).to(values.dtype)
