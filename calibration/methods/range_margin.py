"""How much wider than calibration's own range a constant scale is, so that text of another kind fits into it.

Smoothing levels the channels to the maxima of the text it was made of. The largest channels of another text are other
ones, and saturate. How far they go is seen between the parts of the calibration itself, its kinds of text: one part
makes smoothing and range, and another part is held against them.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.statistics.spikes import ModuleSpikes

Floats = NDArray[np.float32]


def range_margin(parts: Sequence[ModuleSpikes], scales: Sequence[Floats]) -> float:
    """Return the factor by which an input's static range is widened, at least 1.

    For each ordered pair of parts: the mean, over the samples of the second part, of a sample's largest magnitude, in
    units of the range that the first part makes (the mean of its samples' maxima), both behind the first part's
    smoothing. The largest mean counts. Samples and parts without a token at the input say nothing.

    Args:
        parts: What each part of the calibration saw at the input.
        scales: The scales [channels] of the smoothing that each part makes.
    """
    found = [_exceedance(made, of, held) for (made, of), (held, _) in permutations(zip(parts, scales, strict=True), 2)]
    return max(1.0, *found)


def _exceedance(made: ModuleSpikes, scales: Floats, held: ModuleSpikes) -> float:
    covered = made.smoothed_range(scales, "sample-mean")
    reached = held.smoothed_range(scales, "sample-mean")
    return reached / covered if covered > 0 else 1.0
