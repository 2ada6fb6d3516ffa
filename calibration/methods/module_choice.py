"""Which modules stay in 16 bit: by what the user fixed, or by the perplexity of growing sets."""

from collections.abc import Callable
from dataclasses import replace

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import CurvePoint
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.qfem import ModuleChoice, Scores, choose_modules, with_pareto
from spike_export.calibration.statistics.spikes import SpikeStatistics

NOTHING_KEPT = ModuleChoice(alpha=float("inf"), kept=())


def choose_kept(
    calibration: Calibration,
    statistics: SpikeStatistics,
    transform: Transform,
    progress: Progress = silent,
    *,
    per_token: tuple[str, ...] = (),
) -> ModuleChoice:
    """Choose the modules that stay in 16 bit, as the options say; evaluate a curve unless they fix the answer.

    The ratio's order (the paper's) and the estimated noise's compete: the one whose largest allowed set has the lower
    perplexity is bisected.

    Args:
        calibration: The model and its windows.
        statistics: Of the transformed model behind the prefix.
        transform: What was done to the weights.
        progress: Told after each evaluated set.
        per_token: Representatives whose tokens have each a scale of their own, where they are quantized.
    """
    options, config = calibration.options, calibration.checkpoint.config
    by_ratio = Scores.sorted("ratio", statistics.ratios(), config)
    if not options.qfem:
        return replace(NOTHING_KEPT, alpha=max(by_ratio.values.values(), default=0.0))
    if options.alpha is not None:
        return by_ratio.keep_above(options.alpha)
    orders = [by_ratio]
    if transform.noise:
        orders.append(Scores.sorted("noise", transform.noise_with(per_token), config))
    evaluated: dict[tuple[str, ...], float] = {}

    def evaluate(kept: tuple[str, ...]) -> float:
        key = tuple(sorted(kept))
        if key not in evaluated:
            evaluated[key] = calibration.predicted(
                statistics, kept, transform, per_token=per_token, measured=True, compare=False
            ).perplexity
            progress("module sets", len(evaluated), 0)
        return evaluated[key]

    if options.max_fp16_modules is not None:
        return _better([scores.keep_highest(options.max_fp16_modules) for scores in orders], evaluate)

    reference = calibration.reference_perplexity(statistics.prefix_ids)
    largest = [(scores, scores.keep_share(options.max_fp16_share)) for scores in orders]
    scores, most = min(largest, key=lambda pair: evaluate(pair[1].kept))
    choice = choose_modules(scores, evaluate, reference, options.tolerance, most)
    others = tuple(
        _point(other, each, evaluate(each.kept)) for other, each in largest if other is not scores and each.kept
    )
    return replace(choice, curve=with_pareto((*choice.curve, *others)))


def _better(choices: list[ModuleChoice], evaluate: Callable[[tuple[str, ...]], float]) -> ModuleChoice:
    if len({frozenset(choice.kept) for choice in choices}) == 1:
        return choices[0]
    return min(choices, key=lambda choice: evaluate(choice.kept))


def _point(scores: Scores, choice: ModuleChoice, perplexity: float) -> CurvePoint:
    return CurvePoint(
        criterion=scores.criterion,
        fp16_modules=choice.linears,
        fp16_share=scores.share(choice.kept),
        alpha=choice.alpha,
        perplexity=perplexity,
    )
