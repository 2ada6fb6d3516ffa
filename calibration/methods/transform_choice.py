"""How the model is transformed before it is quantized: rotated or not, each input smoothed and clipped, and those of
`down_proj`, or all, behind a Hadamard transform or not.

Which inputs get a scale per token is chosen here too: they are smoothed otherwise than inputs with a constant, whose
smoothing has to level the tokens as well as the channels, and stretches the weights for that.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CalibrationError, RecipeError
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import HadamardPlan, RotationPlan, SmoothingPlan, TransformCandidate
from spike_export.calibration.decoder.equivalent.equivalent_weights import rotation_obstacle
from spike_export.calibration.decoder.equivalent.hadamard import hadamard_plan, value_block
from spike_export.calibration.decoder.equivalent.rotation import rotation_plan
from spike_export.calibration.decoder.layerwise import BATCH_TOKENS
from spike_export.calibration.decoder.perplexity import Score
from spike_export.calibration.methods.activation_choice import (
    ActivationChoice,
    choose_activations,
    favoured_inputs,
)
from spike_export.calibration.methods.context import NO_TRANSFORM, Calibration, Transform
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.smoothing_search import SiteChoice, SmoothingSearch, TokenChoice
from spike_export.calibration.methods.spreading import even_parts, telling
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.decoder_config import DecoderConfig
from spike_export.checkpoint.modules import is_down_projection, is_output_projection, split_name

ROTATION_SEEDS = (0, 1)
"""Seeds that are compared where a rotation may be used."""

UNTYING = 0.003
"""Divergence, in nats per token, that a rotation has to save in a model whose head is tied to the embedding: the
rotated head is another matrix, so that the bundle grows by one."""


HADAMARD_WORTH = 0.1
"""Smallest share of the divergence that the Hadamard transform of `down_proj`'s inputs has to save, and that of the
blocks' inputs beside it: every call computes them."""


@dataclass(frozen=True)
class TransformChoice:
    """The chosen transform, what it competed with, and the inputs with a scale per token, for which it is made."""

    transform: Transform = NO_TRANSFORM
    candidates: tuple[TransformCandidate, ...] = ()
    kinds: ActivationChoice = field(default_factory=ActivationChoice)


def choose_transform(calibration: Calibration, behind: SpikeStatistics, progress: Progress = silent) -> TransformChoice:
    """Search smoothing and clipping, with and without a rotation, and a Hadamard transform of `down_proj`'s inputs or
    of all.

    The least divergence from the model itself wins, with scales per token at the inputs that would get them: what
    constants everywhere cost is mostly the cost of a few inputs that will have none.

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
        searched = _searched(calibration, statistics, rotation, progress)
        for label, found in _with_and_without_hadamard(calibration, name, searched):
            per_token = favoured_inputs(calibration, statistics, found.final())
            score = found.score(calibration, statistics, per_token)
            tried.append(_Tried(label, statistics, found, per_token, score))
    best = min(tried, key=lambda each: _cost(calibration, each.found, each.score))
    candidates = tuple(
        TransformCandidate(
            name=each.name,
            perplexity=each.score.perplexity,
            divergence=each.score.divergence,
            verdict="chosen" if each is best else "further from the unquantized model",
        )
        for each in tried
    )
    kinds = _kinds(calibration, best, progress)
    return TransformChoice(best.found.final(kinds.per_token), candidates, kinds)


def _kinds(calibration: Calibration, tried: "_Tried", progress: Progress) -> ActivationChoice:
    def score(per_token: tuple[str, ...]) -> Score:
        if per_token == tried.per_token:
            return tried.score
        return tried.found.score(calibration, tried.statistics, per_token)

    return choose_activations(calibration, tried.statistics, tried.found.final(), score, progress)


def require_rotation(options: CalibrationOptions, config: DecoderConfig) -> None:
    """Refuse to rotate a family that cannot be rotated.

    Raises:
        RecipeError: A rotation is demanded; names the obstacle.
    """
    obstacle = rotation_obstacle(config)
    if options.rotation == "always" and obstacle is not None:
        raise RecipeError(f"--rotation always: {config.family.model_type} cannot be rotated: {obstacle}")


def _cost(calibration: Calibration, found: "_Found", score: Score) -> float:
    unties = found.rotation is not None and calibration.checkpoint.config.tie_word_embeddings
    transforms = (found.hadamard is not None) + found.inputs
    return score.divergence / (1 - HADAMARD_WORTH) ** transforms + (
        UNTYING if unties and calibration.options.rotation == "auto" else 0.0
    )


def _with_and_without_hadamard(calibration: Calibration, name: str, found: "_Found") -> "Iterator[tuple[str, _Found]]":
    """Yield the competitors that differ in the Hadamard transforms only, by name."""
    plan, wanted = _hadamard(calibration), calibration.options.hadamard
    inputs = any(choice.transformed and not is_down_projection(site) for site, choice in found.choices.items())
    compared = [(name, found)]
    if plan is not None:
        compared.append((f"{name} + Hadamard", replace(found, hadamard=plan)))
    if inputs:
        compared.append((f"{name} + Hadamard at every input", replace(found, hadamard=plan, inputs=True)))
    yield from compared[-1:] if wanted == "always" else compared


def _hadamard(calibration: Calibration) -> HadamardPlan | None:
    """Return the transform that may be used; None where the options or the model's shape leave it out."""
    wanted = calibration.options.hadamard
    return None if wanted == "never" else hadamard_plan(calibration.checkpoint.config.inner_size)


def _input_block(calibration: Calibration) -> int | None:
    """Return the channels of a block of the transform that the blocks' inputs may pass; None to leave it out."""
    plan = hadamard_plan(calibration.checkpoint.config.hidden_size)
    return None if plan is None or calibration.options.hadamard in ("down_proj", "never") else plan.block


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
    """What a search ends at: of each input, by its representative, the best scales for either kind.

    Attributes:
        rotation: Of the model that was searched.
        choices: What was found.
        hadamard: Of `down_proj`'s inputs; None to leave them as they are.
        inputs: Whether the inputs of blocks pass a Hadamard transform, those that it suits.
    """

    rotation: RotationPlan | None
    choices: Mapping[str, SiteChoice]
    hadamard: HadamardPlan | None = None
    inputs: bool = False

    def compared(self, per_token: Collection[str] = ()) -> Transform:
        """Return the transform for inputs of these kinds, made of the windows that no candidate is judged on."""
        return self._transform(per_token, lambda each: each.smoothing)

    def final(self, per_token: Collection[str] = ()) -> Transform:
        """Return the same transform, made of all windows."""
        return self._transform(per_token, lambda each: each.final)

    @property
    def _sites(self) -> Mapping[str, SiteChoice]:
        """The choices of the inputs as they are with or without the Hadamard transforms."""
        passing = {True: self.hadamard is not None, False: self.inputs}
        return {
            name: (choice.transformed if passing[is_down_projection(name)] else None) or choice
            for name, choice in self.choices.items()
        }

    def _transform(
        self, per_token: Collection[str], plan: Callable[[SiteChoice | TokenChoice], SmoothingPlan | None]
    ) -> Transform:
        choices = self._sites
        chosen = {name: choice.tokens if name in per_token else choice for name, choice in choices.items()}
        blocks = {name: each.block for name, each in chosen.items() if each.block is not None}
        return Transform(
            self.rotation,
            _once_per_norm({name: plan(each) for name, each in chosen.items()}),
            clips={name: choice.clip for name, choice in choices.items()},
            noise={name: choice.noise for name, choice in choices.items()},
            token_noise={name: choice.tokens.noise for name, choice in choices.items()},
            hadamard=self.hadamard,
            value_rotation={name: block for name, block in blocks.items() if is_output_projection(name)},
            input_hadamard={name: block for name, block in blocks.items() if not is_output_projection(name)},
        )

    def score(self, calibration: Calibration, statistics: SpikeStatistics, per_token: tuple[str, ...] = ()) -> Score:
        """Return what the model is worth with a scale per token at some inputs, on windows that no scale is made of."""
        compared = calibration.held_out(statistics)
        return calibration.predicted(compared, (), self.compared(per_token), per_token=per_token)


@dataclass(frozen=True)
class _Tried:
    """A competitor: its statistics, what the search found in them, and what that is worth.

    Attributes:
        name: As the recipe lists it.
        statistics: Of the model before smoothing.
        found: By the search.
        per_token: The inputs with a scale per token; the others have a constant.
        score: On windows that no scale is made of.
    """

    name: str
    statistics: SpikeStatistics
    found: _Found
    per_token: tuple[str, ...]
    score: Score


def _searched(
    calibration: Calibration, statistics: SpikeStatistics, rotation: RotationPlan | None, progress: Progress
) -> _Found:
    options, config, plan = calibration.options, calibration.checkpoint.config, _hadamard(calibration)
    fed = calibration.fed(calibration.search_windows, statistics.prefix_ids)
    search = SmoothingSearch(
        config=config,
        statistics=statistics,
        compared=calibration.held_out(statistics),
        weights=options.weights,
        activations=options.searched_activations,
        activation_range=options.activation_range,
        smoothing=options.smoothing,
        rotated=rotation is not None,
        stride=SmoothingSearch.stride_of(fed.size),
        windows=len(fed),
        hadamard=None if plan is None else plan.block,
        input_block=_input_block(calibration),
        value_block=value_block(config) if options.value_rotation == "auto" else None,
        parts=calibration.parts(statistics),
    )
    choices = _choices(calibration, search, fed, rotation, progress)
    _require_finite({name: choice.noise for name, choice in choices.items()})
    return _Found(rotation, choices)


def _choices(
    calibration: Calibration,
    search: SmoothingSearch,
    fed: NDArray[np.int64],
    rotation: RotationPlan | None,
    progress: Progress,
) -> dict[str, SiteChoice]:
    """Search all layers while windows [windows, tokens] pass; each of several processes searches some of the layers."""
    workers = calibration.workers
    if workers is None:
        return _choices_here(calibration, search, fed, rotation, progress)
    parts = even_parts(search.config.num_hidden_layers, workers.count)
    calls = [(replace(search, layers=layers), fed, rotation) for layers in parts]
    calibration.count_forwarded(fed)
    found = workers.results(_choices_here, calls, telling(progress, "layers", parts))
    return {name: choice for part in found for name, choice in part.items()}


def _choices_here(
    calibration: Calibration,
    search: SmoothingSearch,
    fed: NDArray[np.int64],
    rotation: RotationPlan | None,
    progress: Progress = silent,
) -> dict[str, SiteChoice]:
    """Return what the search finds; the windows pass all layers, as they are, wherever the search looks."""
    decoder, own = calibration.transformed(Transform(rotation=rotation)).decoder, replace(search, choices={})
    # One device: a site's candidates are compared on all rows.
    one = replace(decoder, execution=replace(decoder.execution, devices=decoder.execution.devices[:1]))
    one.run(fed, search.statistics.prefix_ids, visits=(own.visit,), batch_tokens=BATCH_TOKENS, progress=progress)
    return own.choices


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
