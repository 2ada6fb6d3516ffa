"""Which inputs get a scale per token: those whose constant scale costs most on held-out text, for their size.

A constant scale is fitted to the calibration's text. Where another text's largest values lie elsewhere, as they do
between the two products of a feed-forward block, each token's own scale is nearly the whole difference.
"""

from collections.abc import Callable
from dataclasses import dataclass

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import ActivationCandidate
from spike_export.calibration.decoder.perplexity import Score
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.qfem import Scores, linear_count
from spike_export.calibration.statistics.spikes import SpikeStatistics

WORTH = 0.1
"""Smallest share of the divergence that scales per token have to save, to be used at all."""

SUFFICIENT = 0.95
"""Share of what the largest set of inputs saves that a smaller set has to save, to be taken instead."""

_HALVINGS = 2
"""Smaller sets that are evaluated; each costs a pass over the search windows."""


@dataclass(frozen=True)
class ActivationChoice:
    """How the inputs of the quantized linears are scaled.

    Attributes:
        per_token: Representatives whose tokens have each a scale of their own; the others have a constant.
        candidates: The sets that were compared.
    """

    per_token: tuple[str, ...] = ()
    candidates: tuple[ActivationCandidate, ...] = ()


def choose_activations(
    calibration: Calibration, statistics: SpikeStatistics, transform: Transform, progress: Progress = silent
) -> ActivationChoice:
    """Choose the inputs with a scale per token, where the options leave it open.

    Inputs are ordered by the noise that a scale per token saves, for each multiply-accumulate of their readers; where
    no search estimated the noise, by max-median ratio. The largest set has the first inputs, as many as fit into
    `max_per_token_share`. The smallest of the evaluated sets that saves nearly as much divergence is taken.

    Args:
        calibration: The model and its windows.
        statistics: Of the transformed model behind the prefix, of all calibration windows.
        transform: What was done to the weights.
        progress: Told after each evaluated set.
    """
    if calibration.options.activations != "auto":
        return ActivationChoice()
    order = _order(calibration, statistics, transform)
    most = order.keep_share(calibration.options.max_per_token_share).kept
    if not most:
        return ActivationChoice()
    compared, evaluated = calibration.held_out(statistics), dict[int, Score]()

    def divergence(count: int) -> float:
        if count not in evaluated:
            evaluated[count] = calibration.predicted(compared, (), transform, per_token=most[:count], measured=True)
            progress("sets of inputs", len(evaluated), 0)
        return evaluated[count].divergence

    chosen = _smallest(len(most), divergence)
    candidates = (_candidate(order, most[:count], score, chosen) for count, score in sorted(evaluated.items()))
    return ActivationChoice(most[:chosen], tuple(candidates))


def _candidate(order: Scores, per_token: tuple[str, ...], score: Score, chosen: int) -> ActivationCandidate:
    other = "saves too little" if len(per_token) < chosen else "saves hardly more"
    return ActivationCandidate(
        per_token_linears=linear_count(per_token),
        per_token_share=order.share(per_token),
        perplexity=score.perplexity,
        divergence=score.divergence,
        verdict="chosen" if len(per_token) == chosen else other,
    )


def _order(calibration: Calibration, statistics: SpikeStatistics, transform: Transform) -> Scores:
    """Return the inputs in the order in which they get a scale per token."""
    by_ratio = Scores.sorted("ratio", statistics.ratios(), calibration.checkpoint.config)
    if not transform.noise:
        return by_ratio
    saved = {name: noise - transform.token_noise[name] for name, noise in transform.noise.items()}
    rates = {name: saved[name] / by_ratio.macs[name] for name in saved if saved[name] > 0}
    return Scores("noise", dict(sorted(rates.items(), key=lambda rate: -rate[1])), by_ratio.macs)


def _smallest(most: int, divergence: Callable[[int], float]) -> int:
    """Return how many of the first inputs suffice; 0 where even the most save too little."""
    static = divergence(0)
    saved = static - divergence(most)
    if not saved > WORTH * static:
        return 0
    low, high = 0, most
    for _ in range(_HALVINGS):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        if static - divergence(middle) >= SUFFICIENT * saved:
            high = middle
        else:
            low = middle
    return high
