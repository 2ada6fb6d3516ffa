"""An old recipe on new weights of the same architecture: which modules drifted, and what the recipe costs there."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import LARGEST, ModulePlan, Recipe
from spike_export.calibration.decoder.equivalent.equivalent_weights import transformed_checkpoint
from spike_export.calibration.decoder.layerwise import Decoder, Head, Visit
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.calibration.statistics.spikes import ModuleSpikes
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import linears

BEYOND, BELOW = 2.0, 0.25
"""Largest magnitudes, as multiples of the calibration's, from and up to which a static scale is out of place. A few
windows see less than all of the calibration's, so that the lower one is far off."""


@dataclass(frozen=True, slots=True)
class DriftedModule:
    """An input that the recipe does not fit any more.

    Attributes:
        module: HF name of the linear that stands for all that read the input.
        reason: What is wrong.
        growth: Largest magnitude as a multiple of what calibration saw; None where the recipe does not say that.
        ratio: Max-median ratio now.
        recipe_ratio: The same when the recipe was made; None where the recipe does not say that.
    """

    module: str
    reason: str
    growth: float | None
    ratio: float
    recipe_ratio: float | None


@dataclass(frozen=True)
class Revalidation:
    """A recipe on a checkpoint that it was not made for.

    Attributes:
        drifted: The inputs that it does not fit, those whose magnitudes grew most first.
        compared: Inputs compared.
        windows: Windows read.
        tokens: Tokens of each.
        increases: Of each window's mean negative log-likelihood by quantization, in nats: simulated, behind the prefix.
    """

    drifted: tuple[DriftedModule, ...]
    compared: int
    windows: int
    tokens: int
    increases: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether the recipe still fits every input."""
        return not self.drifted

    def document(self) -> dict[str, Any]:
        """Return the result as JSON's values; `increase` is that of the perplexity, as a fraction."""
        return {"format": 1, "passed": self.passed, "increase": self.increase, **asdict(self)}

    @property
    def increase(self) -> float:
        """Of the perplexity by quantization, as a fraction."""
        return float(np.expm1(np.mean(self.increases)))


def revalidate_recipe(
    checkpoint: Checkpoint, recipe: Recipe, content: NDArray[np.int64], progress: Progress = silent
) -> Revalidation:
    """Hold a recipe against a checkpoint of the same architecture, on a few windows [windows, tokens] without BOS.

    Raises:
        RecipeError: The recipe's modules are not this decoder's, or its smoothing does not fit.
        CalibrationError: An input was not finite.
    """
    if set(recipe.modules) != set(linears(checkpoint.config)):
        strange = sorted(set(recipe.modules) ^ set(linears(checkpoint.config)))
        raise RecipeError(
            f"the recipe was made for {recipe.model.source}, of another architecture than {checkpoint.name}: only one "
            f"of them has {strange[0]}; calibrate this model"
        )
    decoder = Decoder(transformed_checkpoint(checkpoint, recipe))
    fed = content if checkpoint.bos_token_id in recipe.prefix_ids else with_bos(content, checkpoint.bos_token_id)
    measured = measure_spikes(decoder, fed, recipe.prefix_ids, progress=progress)
    found = [each for name, spikes in measured.modules.items() for each in _drift(name, spikes, recipe)]
    windows, tokens = content.shape
    drifted = tuple(sorted(found, key=lambda each: -(each.growth or 0.0)))
    increases = _increases(decoder, recipe, content, fed)
    return Revalidation(drifted, len(measured.modules), windows, tokens, increases)


def _drift(name: str, spikes: ModuleSpikes, recipe: Recipe) -> Iterator[DriftedModule]:
    """Yield the module where an input drifted."""
    plan = recipe.modules[name]
    seen = plan.activation_amax
    growth = spikes.amax / seen if seen else None
    reason = _reason(plan, spikes, growth, recipe)
    if reason is not None and spikes.reached:
        yield DriftedModule(name, reason, growth, spikes.ratio, plan.ratio)


def _reason(plan: ModulePlan, spikes: ModuleSpikes, growth: float | None, recipe: Recipe) -> str | None:
    """Return what is wrong with the input of a module, or None."""
    if plan.number_format is None:
        return None
    if plan.static_scale is not None:
        share = spikes.amax / (plan.static_scale * LARGEST[plan.number_format])
        reach = share if growth is None else growth
        if reach > BEYOND and share > 1:
            return f"saturates: the input reaches {share:.3g} times the range of its scale"
        if reach < BELOW:
            return f"too coarse: the input uses {share:.2g} of the range of its scale"
    limit = recipe.alpha if recipe.criterion == "ratio" else None
    if limit is not None and plan.ratio is not None and spikes.ratio > max(limit, BEYOND * plan.ratio):
        return f"has spikes: a ratio above the threshold {limit:.3g} of the recipe"
    return None


def _increases(
    decoder: Decoder, recipe: Recipe, content: NDArray[np.int64], fed: NDArray[np.int64]
) -> tuple[float, ...]:
    weights = QuantizedWeights(recipe.scheme.weights, keep=False)
    simulation = Simulation(recipe.modules, weights, recipe.attention, kv_cache=recipe.kv_cache)
    plain = _losses(decoder, decoder.head(), recipe, content, fed, [])
    head = decoder.head(recipe.scheme.head, recipe.head_smoothing)
    quantized = _losses(decoder, head, recipe, content, fed, [simulation.visit])
    return tuple(after - before for before, after in zip(plain, quantized, strict=True))


def _losses(
    decoder: Decoder,
    head: Head,
    recipe: Recipe,
    content: NDArray[np.int64],
    fed: NDArray[np.int64],
    visits: list[Visit],
) -> list[float]:
    """Return the mean negative log-likelihood of each window, in nats."""
    import torch

    states = decoder.run(fed, recipe.prefix_ids, visits=visits, batch_tokens=1)
    losses = []
    with torch.inference_mode():
        for index, tokens in enumerate(content):
            logits = head.logits(states.get(index)[0, -len(tokens) : -1]).float().cpu()
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]))))
    return losses
