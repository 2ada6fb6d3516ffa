"""The prefix as vLLM computes it: as ordinary tokens, through the quantized modules.

In a bundle the prefix's keys and values are constants, computed in full precision, and static scales cover what comes
behind the prefix only. An engine that knows no such constants quantizes the prefix too. Static scales would clip the
spikes that the prefix is there to take, so that the inputs in which the prefix exceeds the calibrated range get a scale
per token here.
"""

from collections.abc import Mapping

import numpy as np

from spike_export.artifacts.recipe import QMAX, ModulePlan, Recipe
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import representative_of


def exceeded_inputs(checkpoint: Checkpoint, recipe: Recipe) -> frozenset[str]:
    """Return the representatives whose static range the prefix itself exceeds.

    Args:
        checkpoint: The smoothed and rotated model, to which the recipe's scales belong.
        recipe: Prefix and scales.
    """
    if not recipe.prefix_ids:
        return frozenset()
    decoder = Decoder(checkpoint, Execution(resident=False))
    statistics = measure_spikes(decoder, np.array([recipe.prefix_ids], np.int64))
    return frozenset(
        name for name, spikes in statistics.modules.items() if spikes.amax > _covered(recipe.modules[name])
    )


def _covered(plan: ModulePlan) -> float:
    """Return the magnitude up to which a static input clips no more than calibration chose to clip."""
    if plan.static_scale is None:
        return float("inf")
    return max(QMAX * plan.static_scale, plan.activation_amax or 0.0)


def with_token_scales(modules: Mapping[str, ModulePlan], inputs: frozenset[str]) -> dict[str, ModulePlan]:
    """Return the plans, those of the readers of these inputs with a scale per token."""
    return {
        name: plan.model_copy(update={"activations": "per-token"}) if representative_of(name) in inputs else plan
        for name, plan in modules.items()
    }
