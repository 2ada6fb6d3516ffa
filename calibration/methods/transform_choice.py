"""How the weights are transformed before they are quantized: rotated or not, and each input smoothed and clipped."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spike_export.artifacts.errors import CalibrationError, RecipeError
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import RotationPlan, SmoothingPlan, TransformCandidate
from spike_export.calibration.decoder.equivalent_weights import rotation_obstacle
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS
from spike_export.calibration.decoder.perplexity import Score
from spike_export.calibration.decoder.rotation import rotation_plan
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration, Transform
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.smoothing_search import SmoothingSearch
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import split_name

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
        compared = calibration.held_out(statistics)
        found = _searched(calibration, statistics, compared, rotation, progress)
        tried.append((name, found, calibration.predicted(compared, (), found.compared)))
    best = min(tried, key=lambda each: _cost(calibration, each[1].compared, each[2]))
    candidates = tuple(
        TransformCandidate(
            name=name,
            perplexity=score.perplexity,
            divergence=score.divergence,
            verdict="chosen" if found is best[1] else "further from the unquantized model",
        )
        for name, found, score in tried
    )
    return TransformChoice(best[1].final, candidates)


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


@dataclass(frozen=True)
class _Found:
    """What a search ends at: made of the windows that no candidate is judged on, and of all."""

    compared: Transform
    final: Transform


def _searched(
    calibration: Calibration,
    statistics: SpikeStatistics,
    compared: SpikeStatistics,
    rotation: RotationPlan | None,
    progress: Progress,
) -> _Found:
    options, config = calibration.options, calibration.checkpoint.config
    windows, prefix = calibration.search_windows, statistics.prefix_ids
    fed = calibration.fed(windows, prefix)
    search = SmoothingSearch(
        config=config,
        statistics=statistics,
        compared=compared,
        weights=options.weights,
        activations=options.searched_activations,
        activation_range=options.activation_range,
        smoothing=options.smoothing,
        rotated=rotation is not None,
        stride=SmoothingSearch.stride_of(fed.size),
    )
    decoder = calibration.transformed(Transform(rotation=rotation)).decoder
    # One device: a site's candidates are compared on all rows.
    one = replace(decoder, execution=replace(decoder.execution, devices=decoder.execution.devices[:1]))
    one.run(fed, prefix, visits=(search.visit,), batch_tokens=BATCH_TOKENS, progress=progress)
    choices = search.choices
    clips = {name: choice.clip for name, choice in choices.items()}
    noise = {name: choice.noise for name, choice in choices.items()}
    token_noise = {name: choice.token_noise for name, choice in choices.items()}
    _require_finite(noise)
    first, second = (
        Transform(rotation, _once_per_norm(plans), clips, noise, token_noise)
        for plans in (
            {name: choice.smoothing for name, choice in choices.items()},
            {name: choice.final for name, choice in choices.items()},
        )
    )
    return _Found(compared=first, final=second)


def _require_finite(noise: Mapping[str, float]) -> None:
    """Refuse a noise that is no figure: nothing could be compared with it.

    Raises:
        CalibrationError: Names the module.
    """
    for name, value in noise.items():
        if not math.isfinite(value):
            raise CalibrationError(
                f"{name}: the noise of its quantization is {value}; the weights are damaged, or a layer's output is "
                "zero everywhere: check the checkpoint's weights"
            )


def _once_per_norm(plans: Mapping[str, SmoothingPlan | None]) -> dict[str, SmoothingPlan]:
    """Return the plans that there are, without those of an input whose norm has the plan already (experts share it)."""
    found: dict[str, SmoothingPlan] = {}
    for name, plan in plans.items():
        layer = split_name(name)[0]
        if plan and not any(split_name(key)[0] == layer and value is plan for key, value in found.items()):
            found[name] = plan
    return found
