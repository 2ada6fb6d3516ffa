"""Symmetric quantization of a linear's weight to 8 bits, laid out as the graph stores it; simulation uses the same."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.blocked_transpose import PANEL_ROWS, store_transposed
from spike_export.calibration.recipe import LARGEST, NumberFormat, WeightScheme

ELEMENTS: Mapping[NumberFormat, np.dtype[Any]] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Number format → numpy's type of its values."""

_SMALLEST_AMAX = np.float32(1e-12)
"""Stands in for the amax of an all-zero channel, because TensorRT refuses a scale of zero."""

Floats = NDArray[np.float32]


def quantize_weight(
    weight: Floats, scheme: WeightScheme, number_format: NumberFormat = "int8"
) -> tuple[NDArray[Any], Floats]:
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
    height, width = weight.shape
    return quantize_rows((height, width), lambda rows: weight[rows], scheme, number_format)


def quantize_rows(
    shape: tuple[int, int], read: Callable[[slice], Floats], scheme: WeightScheme, number_format: NumberFormat = "int8"
) -> tuple[NDArray[Any], Floats]:
    """Do the same for a weight [out_features, in_features] of which `read` returns some rows at a time.

    One scale for the whole tensor takes reading it twice.
    """
    height, width = shape
    panels = [slice(top, min(top + PANEL_ROWS, height)) for top in range(0, height, PANEL_ROWS)]
    quantized = np.empty((width, height), ELEMENTS[number_format])
    if scheme == "int8-per-tensor":
        scale = _scale(np.asarray(max(_amax(read(rows)).max() for rows in panels)), number_format)
        for rows in panels:
            _store(quantized, rows, read(rows), np.broadcast_to(scale, (rows.stop - rows.start, 1)))
        return quantized, scale
    scale = np.empty(height, np.float32)
    for rows in panels:
        panel = read(rows)
        scale[rows] = _scale(_amax(panel), number_format)
        _store(quantized, rows, panel, scale[rows, None])
    return quantized, scale


def _amax(panel: Floats) -> Floats:
    # Two reductions instead of max(abs(w)), which would copy the panel.
    amax: Floats = np.maximum(panel.max(axis=1), -panel.min(axis=1))
    if not np.isfinite(amax).all():
        raise ValueError("the weight holds NaN or infinity")
    return amax


def _scale(amax: Floats, number_format: NumberFormat) -> Floats:
    return np.asarray(np.maximum(amax, _SMALLEST_AMAX) / np.float32(LARGEST[number_format]), np.float32)


def _store(quantized: NDArray[Any], place: slice, panel: Floats, divisor: Floats) -> None:
    def tile(rows: slice, columns: slice) -> NDArray[Any]:
        steps = panel[rows, columns] / divisor[rows]
        if quantized.dtype == np.int8:
            np.rint(steps, out=steps)  # the conversion below would truncate; that to FP8 rounds by itself
        # No clipping: |w| / s exceeds the largest value by the roundings of s and of the quotient only.
        return steps.astype(quantized.dtype)

    store_transposed(quantized, place.start, place.stop, tile)
