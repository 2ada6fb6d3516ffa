"""QFeM: which modules stay in 16 bit because their score exceeds the threshold alpha.

Source: arXiv 2405.14428, "quantization-free module", whose score is the max-median ratio. The reference code publishes
its thresholds but not their search; the automatic choice here bisects over the sorted scores.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from spike_export.artifacts.recipe import Criterion, CurvePoint
from spike_export.checkpoint.decoder_config import DecoderConfig, linear_shapes
from spike_export.checkpoint.modules import expert_of, is_router, siblings, split_name


@dataclass(frozen=True)
class ModuleChoice:
    """Which representatives stay in 16 bit.

    Attributes:
        alpha: The threshold that says the same: score > alpha. It is the largest score that is quantized.
        kept: Representatives with the highest scores, highest first.
        criterion: The score.
        curve: Perplexities that were evaluated on the way, by number of kept linears.
    """

    alpha: float
    kept: tuple[str, ...]
    criterion: Criterion = "ratio"
    curve: tuple[CurvePoint, ...] = ()

    @property
    def linears(self) -> int:
        """Number of linears kept, siblings counted."""
        return linear_count(self.kept)


def linear_count(representatives: tuple[str, ...]) -> int:
    """Return the number of linears that the representatives stand for."""
    return sum(len(siblings(name)) for name in representatives)


@dataclass(frozen=True)
class Scores:
    """The modules in the order in which a criterion keeps them.

    Attributes:
        criterion: What the scores are.
        values: Representative → score, highest first; routers, which are never quantized, left out.
        macs: Representative → multiply-accumulates per token of the linears it stands for, as a share of all.
    """

    criterion: Criterion
    values: Mapping[str, float]
    macs: Mapping[str, float]

    @classmethod
    def sorted(cls, criterion: Criterion, scores: Mapping[str, float], config: DecoderConfig) -> "Scores":
        """Sort scores, highest first; ties keep their order."""
        ordered = sorted(((name, score) for name, score in scores.items() if not is_router(name)), key=lambda x: -x[1])
        return cls(criterion, dict(ordered), mac_shares(config, tuple(scores)))

    def keep_above(self, alpha: float) -> ModuleChoice:
        """Keep the modules whose score exceeds `alpha`."""
        return ModuleChoice(alpha, tuple(name for name, score in self.values.items() if score > alpha), self.criterion)

    def keep_highest(self, max_linears: int) -> ModuleChoice:
        """Keep the modules with the highest scores, as many as fit into `max_linears` linears.

        The choice stays a threshold: it ends at the first module whose siblings no longer fit.
        """
        return self._while_fitting(lambda kept: linear_count(kept) <= max_linears)

    def keep_share(self, max_share: float) -> ModuleChoice:
        """Keep the modules with the highest scores, as many as fit into a share of the multiply-accumulates."""
        return self._while_fitting(lambda kept: self.share(kept) <= max_share)

    def share(self, kept: tuple[str, ...]) -> float:
        """Return the share of the multiply-accumulates that modules have."""
        return math.fsum(self.macs[name] for name in kept)

    def first(self, count: int) -> ModuleChoice:
        """Keep the first `count` representatives."""
        names = tuple(self.values)
        # The largest quantized score; 0, below which there is none, when nothing is quantized.
        alpha = self.values[names[count]] if count < len(names) else 0.0
        return ModuleChoice(alpha, names[:count], self.criterion)

    def _while_fitting(self, fits: Callable[[tuple[str, ...]], bool]) -> ModuleChoice:
        kept: tuple[str, ...] = ()
        for name in self.values:
            if not fits((*kept, name)):
                break
            kept = (*kept, name)
        return self.first(len(kept))


def macs_per_token(config: DecoderConfig) -> dict[str, float]:
    """Return the linears of a decoder layer with the multiply-accumulates that a token needs of them.

    Of a mixture of experts a token needs only some, so that an expert counts in proportion.
    """
    routed = config.experts_per_token / config.num_experts if config.num_experts else 1.0
    return {
        name: math.prod(shape) * (1.0 if expert_of(name) is None else routed)
        for name, shape in linear_shapes(config).items()
    }


def mac_shares(config: DecoderConfig, representatives: tuple[str, ...]) -> dict[str, float]:
    """Return each representative's share of the quantizable linears' multiply-accumulates."""
    linears = macs_per_token(config)
    macs = {
        name: math.fsum(linears[split_name(linear)[1]] for linear in siblings(name))
        for name in representatives
        if not is_router(name)
    }
    total = math.fsum(macs.values())
    return {name: size / total for name, size in macs.items()}


def choose_modules(
    scores: Scores,
    evaluate: Callable[[tuple[str, ...]], float],
    reference: float,
    tolerance: float,
    largest: ModuleChoice,
) -> ModuleChoice:
    """Return the smallest set of the highest scores whose perplexity is within a tolerance of the goal.

    The goal is the 16-bit model's perplexity, or, where that is out of reach, the plateau: what the largest allowed
    set attains. The set is found by bisection, which presumes that keeping more modules does not hurt.

    Args:
        scores: The modules' order.
        evaluate: Perplexity with the given representatives kept and all others quantized.
        reference: Perplexity with nothing quantized.
        tolerance: Allowed relative increase over the goal, e.g. 0.005.
        largest: The largest set to keep.
    """
    names = tuple(scores.values)
    evaluated: dict[int, float] = {}

    def perplexity(count: int) -> float:
        if count not in evaluated:
            evaluated[count] = evaluate(names[:count])
        return evaluated[count]

    most = len(largest.kept)
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
    return replace(scores.first(high), curve=_curve(scores, evaluated))


def _curve(scores: Scores, evaluated: Mapping[int, float]) -> tuple[CurvePoint, ...]:
    choices = {count: scores.first(count) for count in sorted(evaluated)}
    return tuple(
        CurvePoint(
            criterion=scores.criterion,
            fp16_modules=choice.linears,
            fp16_share=scores.share(choice.kept),
            alpha=choice.alpha,
            perplexity=evaluated[count],
        )
        for count, choice in choices.items()
    )


def with_pareto(points: tuple[CurvePoint, ...]) -> tuple[CurvePoint, ...]:
    """Mark the points that no other point beats in both share and perplexity."""

    def beaten(point: CurvePoint) -> bool:
        return any(
            (other.fp16_share, other.perplexity) != (point.fp16_share, point.perplexity)
            and other.fp16_share <= point.fp16_share
            and other.perplexity <= point.perplexity
            for other in points
        )

    return tuple(point.model_copy(update={"pareto": not beaten(point)}) for point in points)
