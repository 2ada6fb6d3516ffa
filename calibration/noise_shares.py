"""From which inputs the estimated noise of a recipe comes."""

import math

from spike_export.artifacts.recipe import Recipe
from spike_export.checkpoint.modules import representative_of


def noise_shares(recipe: Recipe) -> dict[str, float]:
    """Return each input, by its representative, with its share of the noise of INT8 that was estimated for all.

    Inputs of modules that are kept add none. Empty where no search estimated the noise.
    """
    noise = {
        name: plan.noise
        for name, plan in recipe.modules.items()
        if plan.number_format and plan.noise and 0 < plan.noise < math.inf and representative_of(name) == name
    }
    largest = max(noise.values(), default=1.0)
    total = math.fsum(value / largest for value in noise.values())
    return {name: value / largest / total for name, value in noise.items()}
