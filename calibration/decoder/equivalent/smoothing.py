"""Smoothing: dividing the channels of a linear's input by scales that the weights absorb on both sides.

What makes the input (an RMSNorm's gain, the rows of `up_proj` or `v_proj`) is divided by the scales, and the columns
of the linears that read it are multiplied: the model's function stays, its ranges change.
Sources: SmoothQuant (arXiv 2211.10438) and the scaling of Outlier Suppression+ (arXiv 2304.09145).
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import SmoothingPlan
from spike_export.calibration.decoder.exponents import STEPS_PER_OCTAVE, decode_scales, encode_exponents
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import InputSite

Floats = NDArray[np.float32]
Form = Literal["smoothquant", "smoothquant-typical", "outlier-suppression"]

_LARGEST_EXPONENT = 15 * STEPS_PER_OCTAVE
_SMALLEST = np.float32(1e-5)


def is_per_value_head(site: InputSite) -> bool:
    """Return whether the site's input is attention's output, whose scales the value heads absorb."""
    return site.representative == "self_attn.o_proj"


def shared_by_group(channels: Floats, config: DecoderConfig) -> Floats:
    """Reduce [heads * head_dim] to [kv_heads * head_dim]: the maximum over the query heads that share a value head."""
    groups = config.num_attention_heads // config.num_key_value_heads
    shaped = channels.reshape(config.num_key_value_heads, groups, config.head_dim)
    shared: Floats = shaped.max(axis=1).reshape(-1)
    return shared


def repeated_for_group(channels: Floats, config: DecoderConfig) -> Floats:
    """Expand [kv_heads * head_dim] to the [heads * head_dim] input channels of `o_proj`."""
    groups = config.num_attention_heads // config.num_key_value_heads
    shaped = channels.reshape(config.num_key_value_heads, 1, config.head_dim)
    repeated: Floats = np.broadcast_to(shaped, (shaped.shape[0], groups, shaped.shape[2])).reshape(-1)
    return repeated


def smoothing_scales(form: Form, parameter: float, inputs: Floats, weights: Floats) -> Floats:
    """Return the scale per channel.

    Args:
        form: `smoothquant`: a ** p / w ** (1 - p). `smoothquant-typical`: the same of other magnitudes.
            `outlier-suppression`: max(1, a / t), with t = p * max a.
        parameter: p.
        inputs: [channels] magnitude of the input, a: the abs-max, or, typical, the mean of the samples' abs-maxima.
        weights: [channels] magnitude of the readers' columns, w: the abs-max, or, typical, the root mean square.
    """
    inputs, weights = np.maximum(inputs, _SMALLEST), np.maximum(weights, _SMALLEST)
    if form == "outlier-suppression":
        return np.asarray(np.maximum(1, inputs / (parameter * inputs.max())), np.float32)
    return np.asarray(inputs**parameter / weights ** (1 - parameter), np.float32)


def smoothing_plan(form: Form, parameter: float, scales: Floats) -> SmoothingPlan:
    """Return the plan of scales [channels], each rounded to the nearest 2 ** (k / 8); the model stays the same."""
    steps = np.rint(STEPS_PER_OCTAVE * np.log2(scales.astype(np.float64)))
    exponents = np.clip(steps, -_LARGEST_EXPONENT, _LARGEST_EXPONENT).astype(np.int8)
    return SmoothingPlan(form=form, parameter=parameter, exponents=encode_exponents(exponents))


def plan_scales(plan: SmoothingPlan) -> Floats:
    """Return the scales [channels] of a plan.

    Raises:
        ValueError: The exponents are not Base64.
    """
    return decode_scales(plan.exponents)


def head_scales(plan: SmoothingPlan, config: DecoderConfig) -> Floats:
    """Return the scales [hidden] of the head's input.

    Raises:
        RecipeError: The plan cannot be read, or is of a model of another width.
    """
    try:
        scales = plan_scales(plan)
    except ValueError as error:
        raise RecipeError(f"head_smoothing: {error}; remove it, or calibrate again") from error
    if len(scales) != config.hidden_size:
        raise RecipeError(
            f"head_smoothing: {len(scales)} scales for {config.hidden_size} channels; remove it, or calibrate again"
        )
    return scales
