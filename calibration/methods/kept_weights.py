"""How the modules that stay in 16 bit hold their weights: in 16 bit too, or in INT8 (W8A16), in half the bytes.

INT8 weights are exact enough nearly everywhere: what makes a module a spike's victim is its input. The held-out windows
tell whether it is so here.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import ExcludedWeights, KeptWeightsCandidate
from spike_export.calibration.decoder.perplexity import Score
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.qfem import linear_count
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.decoder_config import linear_shapes
from spike_export.checkpoint.modules import siblings, split_name

WORTH = 0.1
"""Smallest share of the divergence that weights in 16 bit have to save, to be worth their second byte."""

_BYTES: dict[ExcludedWeights, int] = {"int8": 1, "unquantized": 2}


@dataclass(frozen=True)
class KeptWeights:
    """How kept modules hold their weights, and what was compared; nothing where the user said it."""

    form: ExcludedWeights = "unquantized"
    candidates: tuple[KeptWeightsCandidate, ...] = ()


def choose_kept_weights(
    calibration: Calibration,
    statistics: SpikeStatistics,
    kept: tuple[str, ...],
    transform: Transform,
    progress: Progress = silent,
    *,
    per_token: Collection[str] = (),
) -> KeptWeights:
    """Choose between INT8 and 16-bit weights for the kept modules, where `excluded_weights` leaves it open.

    Args:
        calibration: The model and its windows.
        statistics: Of the transformed model behind the prefix.
        kept: Representatives that stay in 16 bit.
        transform: What was done to the weights.
        progress: Told after each of the two evaluated forms.
        per_token: Representatives whose tokens have each a scale of their own.
    """
    wanted = calibration.options.excluded_weights
    if wanted != "auto":
        return KeptWeights(wanted)
    if not kept:
        return KeptWeights()
    scores: dict[ExcludedWeights, Score] = {}
    for form in _BYTES:
        as_wished = calibration.with_options(replace(calibration.options, excluded_weights=form))
        scores[form] = as_wished.predicted(statistics, kept, transform, per_token=per_token, measured=True)
        progress("weights of kept modules", len(scores), len(_BYTES))
    narrow, wide = scores["int8"].divergence, scores["unquantized"].divergence
    chosen: ExcludedWeights = "unquantized" if narrow - wide > WORTH * narrow else "int8"
    rejected = "saves too little for its bytes" if chosen == "int8" else "further from the unquantized model"
    return KeptWeights(
        chosen,
        tuple(
            KeptWeightsCandidate(
                weights=form,
                linears=linear_count(kept),
                bytes=_BYTES[form] * _weights(calibration, kept),
                perplexity=found.perplexity,
                divergence=found.divergence,
                verdict="chosen" if form == chosen else rejected,
            )
            for form, found in scores.items()
        ),
    )


def _weights(calibration: Calibration, kept: tuple[str, ...]) -> int:
    """Return the number of weights of the kept modules."""
    shapes = linear_shapes(calibration.checkpoint.config)
    linears = [split_name(linear)[1] for name in kept for linear in siblings(name)]
    return sum(prod(shapes[linear]) for linear in linears)
