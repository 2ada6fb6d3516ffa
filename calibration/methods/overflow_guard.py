"""The guard against float16's overflow: spikes reach thousands, and float16 ends at 65,504.

Calibration records the peaks of inputs, outputs and layer outputs. What comes near the limit is not held in float16.
"""

import numpy as np

from spike_export.artifacts.recipe import Dtype
from spike_export.calibration.statistics.spikes import SpikeStatistics

FLOAT16_MAX = 65504.0

HEADROOM = 2.0
"""How far below the limit a calibrated peak has to stay. Spikes are of certain tokens and hardly depend on the text:
SmolLM2's largest, 24,926 at BOS, is the same in every window."""


def near_limit(peak: float) -> bool:
    """Return whether a magnitude comes too near float16's largest value."""
    return peak * HEADROOM > FLOAT16_MAX


def stream_dtype(dtype: Dtype, statistics: SpikeStatistics) -> tuple[Dtype, str | None]:
    """Return the precision for the residual stream and the attention, and why it is another than asked for.

    The exported graph keeps the residual stream in the unquantized precision, so that a peak there concerns all of it.
    """
    hidden = float(statistics.hidden_amax.max()) if statistics.hidden_amax.size else 0.0
    # Of samples that were not recorded they are NaN.
    operands = max((float(np.fmax.reduce(a, None, initial=0)) for a in statistics.operand_amax.values()), default=0.0)
    # An INT8 product is float32, and is cast when it enters the stream or the attention.
    outputs = max((float(spikes.output_amax.max()) for spikes in statistics.modules.values()), default=0.0)
    peak = max(hidden, operands, outputs)
    if dtype == "float16" and near_limit(peak):
        return "bfloat16", f"peaks of {peak:,.0f} near float16's limit of {FLOAT16_MAX:,.0f}"
    return dtype, None


def module_dtype(dtype: Dtype, peak: float) -> tuple[Dtype, str | None]:
    """Return the precision of a module that is kept, and why it is another than asked for."""
    if dtype == "float16" and near_limit(peak):
        return "float32", f"peak {peak:,.0f} near float16's limit of {FLOAT16_MAX:,.0f}"
    return dtype, None
