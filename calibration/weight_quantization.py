"""Symmetric quantization of a linear's weight to 8 bits, laid out as the graph stores it; simulation uses the same."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.recipe import LARGEST, NumberFormat, WeightScheme

ELEMENTS: Mapping[NumberFormat, np.dtype[Any]] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Number format → numpy's type of its values."""

_SMALLEST_AMAX = np.float32(1e-12)
"""Stands in for the amax of an all-zero channel, because TensorRT refuses a scale of zero."""

_BLOCK_VALUES = 1 << 22
"""Weights quantized at a time: 16 MiB of float32 temporaries, whatever the weight's size."""


def quantize_weight(
    weight: NDArray[np.float32], scheme: WeightScheme, number_format: NumberFormat = "int8"
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Quantize and transpose a weight: round(w / s), half to even, within ±m, with s = max|w| / m.

    m is the format's largest magnitude: 127, or 448 for FP8, whose values are rounded to the nearest of E4M3.

    Args:
        weight: [out_features, in_features] float32, as Hugging Face stores it.
        scheme: One scale per output channel, or one for the whole tensor.
        number_format: Of the result.

    Returns:
        The quantized weight [in_features, out_features] in the type of `ELEMENTS`, contiguous, and its scale:
        [out_features] float32 per channel, 0-D float32 per tensor.

    Raises:
        ValueError: The weight holds NaN or infinity.

    Source: arXiv 2405.14428, section "quantization scheme"; -128 is left unused to stay symmetric.
    """
    axis = 1 if scheme == "int8-per-channel" else None
    # Two reductions instead of max(abs(w)), which would copy the whole weight.
    amax = np.asarray(np.maximum(weight.max(axis=axis), -weight.min(axis=axis)), np.float32)
    if not np.isfinite(amax).all():
        raise ValueError("the weight holds NaN or infinity")
    largest = np.float32(LARGEST[number_format])
    scale = np.asarray(np.maximum(amax, _SMALLEST_AMAX) / largest, np.float32)
    divisor = np.broadcast_to(scale.reshape(-1, 1), (weight.shape[0], 1))
    quantized = np.empty(weight.shape[::-1], ELEMENTS[number_format])
    rows = max(1, _BLOCK_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows] / divisor[start : start + rows]
        if number_format == "int8":
            np.rint(block, out=block)  # the conversion below would truncate; that to FP8 rounds by itself
        np.clip(block, -largest, largest, out=block)
        quantized[:, start : start + rows] = block.T
    return quantized, scale
