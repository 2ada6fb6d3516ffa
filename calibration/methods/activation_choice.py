"""Which inputs get a scale per token: those whose constant scale costs most on held-out text, for their size.

A constant scale is fitted to the calibration's text. Where another text's largest values lie elsewhere, as they do
between the two products of a feed-forward block, each token's own scale is nearly the whole difference. The whole
budget is spent: a constant that suffices for the text of the search need not suffice for others.
"""

from collections.abc import Callable
from dataclasses import dataclass

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import ActivationCandidate
from spike_export.calibration.decoder.perplexity import Score
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration, Transform
from spike_export.calibration.methods.qfem import Scores, linear_count
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.modules import is_down_projection

WORTH = 0.1
"""Smallest share of the divergence that scales per token have to save, to be used at all."""


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
    calibration: Calibration,
    statistics: SpikeStatistics,
    transform: Transform,
    score: Callable[[tuple[str, ...]], Score],
    progress: Progress = silent,
) -> ActivationChoice:
    """Choose the inputs with a scale per token, where the options leave it open.

    Inputs of down projections come first. Among them, and among the others, inputs are ordered by the noise that a
    scale per token saves, for each multiply-accumulate of their readers. Where no search estimated the noise, all are
    ordered by max-median ratio. The first inputs are taken, as many as fit into `max_per_token_share`, unless they save
    too little divergence together.

    Args:
        calibration: The model and its options.
        statistics: Of all calibration windows behind the prefix; their ratios order the inputs.
        transform: Has the noise that was estimated.
        score: Evaluates the model whose representatives of that name have a scale per token, the others a constant.
        progress: Told after each of the two evaluated sets.
    """
    most = favoured_inputs(calibration, statistics, transform)
    if not most:
        return ActivationChoice()
    order = _order(calibration, statistics, transform)
    scores: list[Score] = []
    for per_token in ((), most):
        scores.append(score(per_token))
        progress("sets of inputs", len(scores), 2)
    static, mixed = scores
    pays = static.divergence - mixed.divergence > WORTH * static.divergence
    candidates = (
        _candidate(order, (), static, "further from the unquantized model" if pays else "chosen"),
        _candidate(order, most, mixed, "chosen" if pays else "saves too little"),
    )
    return ActivationChoice(most if pays else (), candidates)


def favoured_inputs(calibration: Calibration, statistics: SpikeStatistics, transform: Transform) -> tuple[str, ...]:
    """Return the inputs that get a scale per token if any do; none where the options leave no choice."""
    if calibration.options.activations != "auto":
        return ()
    return _fitting(_order(calibration, statistics, transform), calibration.options.max_per_token_share)


def choose_measured_activations(
    calibration: Calibration, statistics: SpikeStatistics, progress: Progress = silent
) -> ActivationChoice:
    """Choose the inputs with a scale per token in a model as it is, of which nothing but statistics is known.

    Args:
        calibration: The model and its windows.
        statistics: Of the model behind the prefix, of all calibration windows.
        progress: Told after each of the two evaluated sets.
    """
    compared = calibration.held_out(statistics)

    def score(per_token: tuple[str, ...]) -> Score:
        return calibration.predicted(compared, (), NO_TRANSFORM, per_token=per_token, measured=True)

    return choose_activations(calibration, statistics, NO_TRANSFORM, score, progress)


def _fitting(order: Scores, most: float) -> tuple[str, ...]:
    """Return the inputs that fit into a share of the multiply-accumulates, in order; smaller ones follow larger ones
    that do not fit, because the choice need not be a threshold."""
    taken: tuple[str, ...] = ()
    for name in order.values:
        if order.share((*taken, name)) <= most:
            taken = (*taken, name)
    return taken


def _candidate(order: Scores, per_token: tuple[str, ...], score: Score, verdict: str) -> ActivationCandidate:
    return ActivationCandidate(
        per_token_linears=linear_count(per_token),
        per_token_share=order.share(per_token),
        perplexity=score.perplexity,
        divergence=score.divergence,
        verdict=verdict,
    )


def _order(calibration: Calibration, statistics: SpikeStatistics, transform: Transform) -> Scores:
    """Return the inputs in the order in which they get a scale per token.

    The inputs of down projections come first, whatever they save on the search windows: they are products of two
    activations, and another text may have values in them that are many times what calibration saw. No other input goes
    far beyond its range.
    """
    by_ratio = Scores.sorted("ratio", statistics.ratios(), calibration.checkpoint.config)
    if not transform.noise:
        return by_ratio
    saved = {name: noise - transform.token_noise[name] for name, noise in transform.noise.items()}
    rates = {name: noise / by_ratio.macs[name] for name, noise in saved.items()}
    wanted = {name: rate for name, rate in rates.items() if rate > 0 or is_down_projection(name)}
    order = sorted(wanted, key=lambda name: (not is_down_projection(name), -wanted[name]))
    return Scores("noise", {name: wanted[name] for name in order}, by_ratio.macs)
