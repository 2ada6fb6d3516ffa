"""Symmetric INT8 quantization of a linear's weight, laid out as the graph stores it; simulation uses the same."""

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.recipe import QMAX, WeightScheme

_SMALLEST_AMAX = np.float32(1e-12)
"""Stands in for the amax of an all-zero channel, because TensorRT refuses a scale of zero."""

_BLOCK_VALUES = 1 << 22
"""Weights quantized at a time: 16 MiB of float32 temporaries, whatever the weight's size."""


def quantize_weight(weight: NDArray[np.float32], scheme: WeightScheme) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize and transpose a weight: round(w / s), half to even, within ±127, with s = max|w| / 127.

    Args:
        weight: [out_features, in_features] float32, as Hugging Face stores it.
        scheme: One scale per output channel, or one for the whole tensor.

    Returns:
        The quantized weight [in_features, out_features] int8, contiguous, and its scale: [out_features] float32
        per channel, 0-D float32 per tensor.

    Raises:
        ValueError: The weight holds NaN or infinity.

    Source: arXiv 2405.14428, section "quantization scheme"; -128 is left unused to stay symmetric.
    """
    axis = 1 if scheme == "int8-per-channel" else None
    # Two reductions instead of max(abs(w)), which would copy the whole weight.
    amax = np.asarray(np.maximum(weight.max(axis=axis), -weight.min(axis=axis)), np.float32)
    if not np.isfinite(amax).all():
        raise ValueError("the weight holds NaN or infinity")
    scale = np.asarray(np.maximum(amax, _SMALLEST_AMAX) / np.float32(QMAX), np.float32)
    divisor = np.broadcast_to(scale.reshape(-1, 1), (weight.shape[0], 1))
    quantized = np.empty(weight.shape[::-1], np.int8)
    rows = max(1, _BLOCK_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows] / divisor[start : start + rows]
        np.rint(block, out=block)
        np.clip(block, -QMAX, QMAX, out=block)
        quantized[:, start : start + rows] = block.T
    return quantized, scale
