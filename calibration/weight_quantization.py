"""Symmetric INT8 quantization of a linear's weight, laid out as the graph stores it; simulation uses the same."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.blocked_transpose import PANEL_ROWS, store_transposed
from spike_export.calibration.recipe import QMAX, WeightScheme

_SMALLEST_AMAX = np.float32(1e-12)
"""Stands in for the amax of an all-zero channel, because TensorRT refuses a scale of zero."""

Floats = NDArray[np.float32]


def quantize_weight(weight: Floats, scheme: WeightScheme) -> tuple[NDArray[np.int8], Floats]:
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
    return quantize_rows((height, width), lambda rows: weight[rows], scheme)


def quantize_rows(
    shape: tuple[int, int], read: Callable[[slice], Floats], scheme: WeightScheme
) -> tuple[NDArray[np.int8], Floats]:
    """Do the same for a weight [out_features, in_features] of which `read` returns some rows at a time.

    One scale for the whole tensor takes reading it twice.
    """
    height, width = shape
    panels = [slice(top, min(top + PANEL_ROWS, height)) for top in range(0, height, PANEL_ROWS)]
    quantized = np.empty((width, height), np.int8)
    if scheme == "int8-per-tensor":
        scale = _scale(np.asarray(max(_amax(read(rows)).max() for rows in panels)))
        for rows in panels:
            _store(quantized, rows, read(rows), np.broadcast_to(scale, (rows.stop - rows.start, 1)))
        return quantized, scale
    scale = np.empty(height, np.float32)
    for rows in panels:
        panel = read(rows)
        scale[rows] = _scale(_amax(panel))
        _store(quantized, rows, panel, scale[rows, None])
    return quantized, scale


def _amax(panel: Floats) -> Floats:
    # Two reductions instead of max(abs(w)), which would copy the panel.
    amax: Floats = np.maximum(panel.max(axis=1), -panel.min(axis=1))
    if not np.isfinite(amax).all():
        raise ValueError("the weight holds NaN or infinity")
    return amax


def _scale(amax: Floats) -> Floats:
    return np.asarray(np.maximum(amax, _SMALLEST_AMAX) / np.float32(QMAX), np.float32)


def _store(quantized: NDArray[np.int8], place: slice, panel: Floats, divisor: Floats) -> None:
    def tile(rows: slice, columns: slice) -> NDArray[np.int8]:
        steps = panel[rows, columns] / divisor[rows]
        # No clipping: |w| / s exceeds 127 by the roundings of s and of the quotient only.
        rounded: NDArray[np.int8] = np.rint(steps, out=steps).astype(np.int8)
        return rounded

    store_transposed(quantized, place.start, place.stop, tile)
