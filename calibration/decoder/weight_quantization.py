"""Symmetric quantization of a linear's weight to 8 bits, laid out as the graph stores it; simulation uses the same."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import LARGEST, NumberFormat, WeightScheme
from spike_export.checkpoint.row_blocks import BlockReader, array_reader, block_rows, fill_by_rows, row_blocks

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
    quantized = np.empty((width, height), ELEMENTS[number_format])
    return quantized, quantize_rows(quantized, array_reader(weight), scheme, number_format)


def quantize_rows(
    out: NDArray[Any],
    read: BlockReader,
    scheme: WeightScheme,
    number_format: NumberFormat = "int8",
    *,
    transposed: bool = True,
) -> Floats:
    """Do the same for a weight of which `read` gives some rows at a time.

    Args:
        out: Where the quantized weight goes: [in_features, out_features] in the type of `ELEMENTS`, contiguous, or
            [out_features, in_features] where it is not to be transposed.
        read: Gives rows of the weight [out_features, in_features]; one scale for the whole takes reading it twice.
        scheme: As above.
        number_format: As above.
        transposed: Whether `out` takes the transpose.

    Returns:
        The scale.

    Raises:
        ValueError: The weight holds NaN or infinity.
    """
    import torch

    height, width = out.shape[::-1] if transposed else out.shape
    block = np.empty((block_rows(width), width), np.float32)
    scale = np.empty(height, np.float32)
    if scheme == "int8-per-tensor":
        amax = np.zeros((), np.float32)
        for rows in row_blocks((height, width)):
            values = block[: rows.stop - rows.start]
            read(rows, values)
            amax = np.maximum(amax, _amax(values).max())
        scale[:] = _scale(amax, number_format)

    def quantize(rows: slice, place: NDArray[Any]) -> None:
        steps = block[: len(place)]
        read(rows, steps)
        if scheme == "int8-per-channel":
            scale[rows] = _scale(_amax(steps), number_format)
        # Not times the reciprocal: the product may be another float32 than the quotient. Through torch, which takes
        # half of numpy's time for these steps, with the same bits.
        quotients = torch.from_numpy(steps).div_(torch.from_numpy(scale[rows, None]))
        # No clipping: |w| / s exceeds the largest value by the roundings of s and of the quotient only.
        if number_format == "int8":
            torch.from_numpy(place).copy_(quotients.round_())
        else:
            np.copyto(place, steps, casting="unsafe")

    fill_by_rows(out, quantize, transposed=transposed)
    return scale if scheme == "int8-per-channel" else scale[:1].reshape(())


def _amax(block: Floats) -> Floats:
    # Two reductions instead of max(abs(w)), which would copy the block.
    amax: Floats = np.maximum(block.max(axis=1), -block.min(axis=1))
    if not np.isfinite(amax).all():
        raise ValueError("the weight holds NaN or infinity")
    return amax


def _scale(amax: Floats, number_format: NumberFormat) -> Floats:
    return np.asarray(np.maximum(amax, _SMALLEST_AMAX) / np.float32(LARGEST[number_format]), np.float32)
