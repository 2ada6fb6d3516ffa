"""Recipes with steps for keys and values, measured as calibration does."""

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.methods.kv_cache_steps import CacheRanges
from spike_export.checkpoint.checkpoint import Checkpoint


def with_kv_cache(recipe: Recipe, checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> Recipe:
    """Return the recipe with an INT8 cache, whose steps cover what tokens [windows, tokens] put there."""
    ranges = CacheRanges()
    Decoder(checkpoint).run(tokens, recipe.prefix_ids, visits=(ranges.visit,))
    return recipe.model_copy(update={"kv_cache": ranges.plans()})
