"""How the weights are transformed before they are quantized: rotated or not, and each input smoothed and clipped."""

from dataclasses import dataclass, replace

from spike_export.calibration.calibrate import NO_TRANSFORM, Calibration, Transform
from spike_export.calibration.decoder_config import DecoderConfig
from spike_export.calibration.equivalent_weights import rotation_obstacle
from spike_export.calibration.errors import RecipeError
from spike_export.calibration.layerwise import BATCH_TOKENS
from spike_export.calibration.modules import split_name
from spike_export.calibration.options import CalibrationOptions
from spike_export.calibration.perplexity import Score
from spike_export.calibration.progress import Progress, silent
from spike_export.calibration.recipe import RotationPlan, SmoothingPlan, TransformCandidate
from spike_export.calibration.rotation import rotation_plan
from spike_export.calibration.smoothing_search import SmoothingSearch
from spike_export.calibration.spikes import SpikeStatistics

ROTATION_SEEDS = (0, 1)
"""Seeds that are compared where a rotation may be used."""

UNTYING = 0.003
"""Divergence, in nats per token, that a rotation has to save in a model whose head is tied to the embedding: the
rotated head is another matrix, so that the bundle grows by one."""


@dataclass(frozen=True)
class TransformChoice:
    """The chosen transform, and what it competed with."""

    transform: Transform = NO_TRANSFORM
    candidates: tuple[TransformCandidate, ...] = ()


def choose_transform(calibration: Calibration, behind: SpikeStatistics, progress: Progress = silent) -> TransformChoice:
    """Search smoothing and clipping with and without a rotation; the least divergence from the model itself wins.

    Args:
        calibration: The model and its windows.
        behind: Statistics of all calibration windows behind the chosen prefix, of the weights as they are.
        progress: Told after each layer of a search.

    Raises:
        RecipeError: A rotation is demanded of a family that cannot be rotated.
    """
    if not calibration.options.searches_smoothing:
        return TransformChoice()
    tried = []
    for name, rotation in _rotations(calibration):
        statistics = behind
        if rotation is not None:
            statistics = calibration.measure(behind.prefix_ids, Transform(rotation=rotation))
        transform = _searched(calibration, statistics, rotation, progress)
        tried.append((name, transform, calibration.predicted(statistics, (), transform)))
    best = min(tried, key=lambda each: _cost(calibration, each[1], each[2]))
    candidates = tuple(
        TransformCandidate(
            name=name,
            perplexity=score.perplexity,
            divergence=score.divergence,
            verdict="chosen" if transform is best[1] else "further from the unquantized model",
        )
        for name, transform, score in tried
    )
    return TransformChoice(best[1], candidates)


def require_rotation(options: CalibrationOptions, config: DecoderConfig) -> None:
    """Refuse to rotate a family that cannot be rotated.

    Raises:
        RecipeError: A rotation is demanded; names the obstacle.
    """
    obstacle = rotation_obstacle(config)
    if options.rotation == "always" and obstacle is not None:
        raise RecipeError(f"--rotation always: {config.family.model_type} cannot be rotated: {obstacle}")


def _cost(calibration: Calibration, transform: Transform, score: Score) -> float:
    unties = transform.rotation is not None and calibration.checkpoint.config.tie_word_embeddings
    return score.divergence + (UNTYING if unties and calibration.options.rotation == "auto" else 0.0)


def _rotations(calibration: Calibration) -> list[tuple[str, RotationPlan | None]]:
    """Return the competitors by name."""
    options, config = calibration.options, calibration.checkpoint.config
    plain: tuple[str, RotationPlan | None] = ("smoothing" if options.smoothing else "none", None)
    if options.rotation == "never":
        return [plain]
    require_rotation(options, config)
    if rotation_obstacle(config) is not None:
        return [plain]
    plans = [rotation_plan(config.hidden_size, seed) for seed in ROTATION_SEEDS]
    rotated: list[tuple[str, RotationPlan | None]] = [(f"{plan.kind}, seed {plan.seed}", plan) for plan in plans]
    return rotated if options.rotation == "always" else [plain, *rotated]


def _searched(
    calibration: Calibration, statistics: SpikeStatistics, rotation: RotationPlan | None, progress: Progress
) -> Transform:
    options, config = calibration.options, calibration.checkpoint.config
    windows, prefix = calibration.search_windows, statistics.prefix_ids
    fed = calibration.fed(windows, prefix)
    search = SmoothingSearch(
        config=config,
        statistics=calibration.held_out(statistics),
        weights=options.weights,
        activations=options.activations,
        activation_range=options.activation_range,
        smoothing=options.smoothing,
        rotated=rotation is not None,
        stride=SmoothingSearch.stride_of(fed.size),
    )
    decoder = calibration.transformed(Transform(rotation=rotation)).decoder
    # One device: a site's candidates are compared on all rows.
    one = replace(decoder, execution=replace(decoder.execution, devices=decoder.execution.devices[:1]))
    one.run(fed, prefix, visits=(search.visit,), batch_tokens=BATCH_TOKENS, progress=progress)
    clips: dict[str, float] = {}
    smoothing: dict[str, SmoothingPlan] = {}
    for name, choice in search.choices.items():
        clips[name] = choice.clip
        if choice.smoothing is not None and not _shared(name, choice.smoothing, smoothing):
            smoothing[name] = choice.smoothing
    noise = {name: choice.noise for name, choice in search.choices.items()}
    return Transform(rotation, smoothing, clips, noise)


def _shared(name: str, plan: SmoothingPlan, known: dict[str, SmoothingPlan]) -> bool:
    """Return whether an input behind the same norm has the plan already (experts share their norm's scales)."""
    layer = split_name(name)[0]
    return any(split_name(key)[0] == layer and value is plan for key, value in known.items())
