"""A variant's cost, as the document of a check tells it."""

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.results.check_document import (
    CheckCost,
    CheckDivergence,
    CheckInterval,
    CheckPosition,
    CheckPositions,
)
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.accuracy.distances import Accuracy
from spike_export.engines.accuracy.intervals import Interval

_WORST = 5
"""Positions with the largest divergence that are told."""

_ENDS = (16, 64, 256)
"""Ends of the ranges of positions that are told apart."""

_EXCERPT = 12
"""Tokens that are shown before each of them."""


def check_cost(accuracy: Accuracy, content: NDArray[np.int64], checkpoint: Checkpoint) -> CheckCost:
    """Return what a check's document says of a model's accuracy on windows `content` [windows, tokens]."""
    quantiles = (accuracy.divergence_quantile(share) for share in (0.5, 0.9, 0.99, 0.999, 1.0))
    return CheckCost(
        increase=check_interval(accuracy.increase),
        divergence=check_interval(accuracy.divergence),
        quantiles=CheckDivergence(**dict(zip(CheckDivergence.model_fields, quantiles, strict=True))),
        probability_error=accuracy.probability_error,
        top1_agreement=check_interval(accuracy.top1_agreement),
        top5_agreement=check_interval(accuracy.top5_agreement),
        worst=tuple(
            CheckPosition(
                window=window,
                position=position + 1,
                divergence=divergence,
                text=_excerpt(checkpoint, content[window], position + 1),
            )
            for window, position, divergence in accuracy.worst(_WORST)
        ),
        positions=tuple(
            CheckPositions(
                first=part.start + 1,
                last=part.stop,
                increase=there.increase.mean,
                divergence=there.divergence.mean,
                top1_agreement=there.top1_agreement.mean,
            )
            for part in _ranges(content.shape[1] - 1)
            for there in (accuracy.at(part),)
        ),
        losses=accuracy.losses,
    )


def _ranges(positions: int) -> list[slice]:
    """Return the ranges up to each of `_ENDS` that a window of so many predictions has."""
    ends = sorted({min(end, positions) for end in (*_ENDS, positions)})
    return [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def check_interval(interval: Interval) -> CheckInterval:
    """Return an interval as a check's document has it."""
    return CheckInterval(mean=interval.mean, margin=interval.margin)


def _excerpt(checkpoint: Checkpoint, tokens: NDArray[np.int64], position: int) -> str:
    """Return the predicted token of a window and what stands before it."""
    if checkpoint.tokenizer is None:
        return ""
    before = tokens[max(0, position - _EXCERPT) : position]
    parts = (checkpoint.tokenizer.decode(part.tolist()) for part in (before, tokens[position : position + 1]))
    return " → ".join(str(part) for part in parts)
