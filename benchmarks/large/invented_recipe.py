"""A recipe for measuring time and memory: it needs no calibration, and says nothing about accuracy."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from spike_export.artifacts.recipe import Recipe, SmoothingPlan
    from spike_export.checkpoint.checkpoint import Checkpoint
    from spike_export.checkpoint.decoder_config import DecoderConfig

_STEP = 0.03
"""Of every activation: what it is does not matter for time."""

_STRENGTH, _SCALES = 0.5, (0.5, 2.0)
"""Of smoothed channels, by turns: nor do these."""


def invented_recipe(checkpoint: "Checkpoint", *, prefix_and_smoothing: bool = False) -> "Recipe":
    """Return a recipe with every decoder linear but routers in INT8.

    Args:
        checkpoint: The model.
        prefix_and_smoothing: Whether there are a prefix of one token, and scales of every input that can be smoothed.
    """
    from spike_export.artifacts.recipe import CorpusSource, ModelSource, ModulePlan, Prefix, Recipe, Scheme
    from spike_export.checkpoint.modules import is_router, linears

    kept, quantized = ModulePlan(precision="float32"), ModulePlan(precision="int8", activation_scale=_STEP)
    return Recipe(
        model=ModelSource(
            source=checkpoint.name,
            architecture=checkpoint.config.family.model_type,
            sha256=checkpoint.tensors.sha256(),
        ),
        corpus=CorpusSource(name="none", sha256="0", samples=1, length=1, seed=0),
        scheme=Scheme(),
        alpha=None,
        prefix=Prefix(token_ids=(1,), text="", ratio=1.0) if prefix_and_smoothing else None,
        smoothing=_smoothing(checkpoint.config) if prefix_and_smoothing else {},
        modules={name: kept if is_router(name) else quantized for name in linears(checkpoint.config)},
    )


def _smoothing(config: "DecoderConfig") -> "dict[str, SmoothingPlan]":
    from spike_export.calibration.decoder.equivalent.smoothing import is_per_value_head, shared_by_group, smoothing_plan
    from spike_export.checkpoint.decoder_config import linear_shapes
    from spike_export.checkpoint.modules import input_sites

    plans = {}
    for site in input_sites(config):
        scales = np.resize(np.array(_SCALES, np.float32), linear_shapes(config)[site.representative][1])
        if is_per_value_head(site):
            scales = shared_by_group(scales, config)
        if site.producer is not None:
            plans[site.representative] = smoothing_plan("smoothquant", _STRENGTH, scales)
    return {
        f"model.layers.{index}.{name}": plan
        for index in range(config.num_hidden_layers)
        for name, plan in plans.items()
    }
