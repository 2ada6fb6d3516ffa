"""A recipe for measuring time and memory: it needs no calibration, and says nothing about accuracy."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spike_export.calibration.checkpoint import Checkpoint
    from spike_export.calibration.recipe import Recipe

_STEP = 0.03
"""Of every activation: what it is does not matter for time."""


def invented_recipe(checkpoint: "Checkpoint") -> "Recipe":
    """Return a recipe with every decoder linear but routers in INT8."""
    from spike_export.calibration.modules import is_router, linears
    from spike_export.calibration.recipe import CorpusSource, ModelSource, ModulePlan, Recipe, Scheme

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
        prefix=None,
        modules={name: kept if is_router(name) else quantized for name in linears(checkpoint.config)},
    )
