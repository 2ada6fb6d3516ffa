"""Symmetric INT8 quantization of a linear's weight, laid out as the graph stores it; simulation uses the same."""

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.blocked_transpose import TILE_ROWS, transposed
from spike_export.calibration.recipe import QMAX, WeightScheme

_SMALLEST_AMAX = np.float32(1e-12)
"""Stands in for the amax of an all-zero channel, because TensorRT refuses a scale of zero."""


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
    height, width = weight.shape
    amax = np.empty(height, np.float32)
    for start in range(0, height, TILE_ROWS):
        rows = weight[start : start + TILE_ROWS]
        # Two reductions instead of max(abs(w)), which would copy the rows.
        np.maximum(rows.max(axis=1), -rows.min(axis=1), out=amax[start : start + TILE_ROWS])
    amax = amax if scheme == "int8-per-channel" else np.asarray(amax.max())
    if not np.isfinite(amax).all():
        raise ValueError("the weight holds NaN or infinity")
    scale = np.asarray(np.maximum(amax, _SMALLEST_AMAX) / np.float32(QMAX), np.float32)
    divisor = np.broadcast_to(scale.reshape(-1, 1), (height, 1))

    def tile(rows: slice, columns: slice) -> NDArray[np.int8]:
        steps = weight[rows, columns] / divisor[rows]
        # No clipping: |w| / s exceeds 127 by the roundings of s and of the quotient only.
        rounded: NDArray[np.int8] = np.rint(steps, out=steps).astype(np.int8)
        return rounded

    return transposed((height, width), np.int8, tile), scale
