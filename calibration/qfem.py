"""QFeM: which modules stay in 16 bit because their max-median ratio exceeds the threshold alpha.

Source: arXiv 2405.14428, "quantization-free module". The reference code publishes its thresholds but not their
search; the automatic choice here bisects over the sorted ratios.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spike_export.calibration.modules import siblings
from spike_export.calibration.recipe import CurvePoint

AUTOMATIC_SHARE = 0.1
"""Largest share of the linears that the automatic choice keeps in 16 bit; the curve's plateau is read off there."""


@dataclass(frozen=True)
class ModuleChoice:
    """Which representatives stay in 16 bit.

    Attributes:
        alpha: The threshold that says the same: ratio > alpha. It is the largest ratio that is quantized.
        kept: Representatives with the highest ratios, highest first.
        curve: Perplexities that were evaluated on the way, by number of kept linears.
    """

    alpha: float
    kept: tuple[str, ...]
    curve: tuple[CurvePoint, ...] = ()

    @property
    def linears(self) -> int:
        """Number of linears kept, siblings counted."""
        return linear_count(self.kept)


def linear_count(representatives: tuple[str, ...]) -> int:
    """Return the number of linears that the representatives stand for."""
    return sum(len(siblings(name)) for name in representatives)


def keep_above(ratios: Mapping[str, float], alpha: float) -> ModuleChoice:
    """Keep the modules whose ratio exceeds `alpha`. `ratios` are sorted, highest first."""
    return ModuleChoice(alpha, tuple(name for name, ratio in ratios.items() if ratio > alpha))


def keep_highest(ratios: Mapping[str, float], max_linears: int) -> ModuleChoice:
    """Keep the modules with the highest ratios, as many as fit into `max_linears` linears.

    The choice stays a threshold: it ends at the first module whose siblings no longer fit.
    """
    kept: tuple[str, ...] = ()
    for name in ratios:
        if linear_count((*kept, name)) > max_linears:
            break
        kept = (*kept, name)
    return _choice(ratios, len(kept))


def _choice(ratios: Mapping[str, float], count: int) -> ModuleChoice:
    names = tuple(ratios)
    # The largest quantized ratio; below 1, the smallest ratio there can be, when nothing is quantized.
    alpha = ratios[names[count]] if count < len(names) else 0.0
    return ModuleChoice(alpha, names[:count])


def choose_modules(
    ratios: Mapping[str, float],
    evaluate: Callable[[tuple[str, ...]], float],
    reference: float,
    tolerance: float,
    max_linears: int,
) -> ModuleChoice:
    """Return the smallest set of the highest ratios whose perplexity is within a tolerance of the goal.

    The goal is the 16-bit model's perplexity, or, where that is out of reach, the plateau: what the largest allowed
    set attains. The set is found by bisection, which presumes that keeping more modules does not hurt.

    Args:
        ratios: Representative → ratio, highest first.
        evaluate: Perplexity with the given representatives kept and all others quantized.
        reference: Perplexity with nothing quantized.
        tolerance: Allowed relative increase over the goal, e.g. 0.005.
        max_linears: Largest number of linears to keep.
    """
    names = tuple(ratios)
    evaluated: dict[int, float] = {}

    def perplexity(count: int) -> float:
        if count not in evaluated:
            evaluated[count] = evaluate(names[:count])
        return evaluated[count]

    most = len(keep_highest(ratios, max_linears).kept)
    goal = (1 + tolerance) * max(reference, perplexity(most))
    low, high = -1, most  # `high` is good enough; `low` is not (or is no count at all)
    while high - low > 1:
        middle = max(0, (low + high) // 2)
        # An overflowed perplexity is never good enough, not even where the plateau overflowed too.
        if math.isfinite(perplexity(middle)) and perplexity(middle) <= goal:
            high = middle
        else:
            low = middle
    perplexity(0)  # the curve always shows what QFeM gains
    chosen = _choice(ratios, high)
    return ModuleChoice(chosen.alpha, chosen.kept, _curve(ratios, evaluated))


def _curve(ratios: Mapping[str, float], evaluated: Mapping[int, float]) -> tuple[CurvePoint, ...]:
    choices = {count: _choice(ratios, count) for count in sorted(evaluated)}
    return tuple(
        CurvePoint(fp16_modules=choice.linears, alpha=choice.alpha, perplexity=evaluated[count])
        for count, choice in choices.items()
    )
