"""An old recipe on changed weights: the module that drifted is named, an unchanged model passes."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.calibration.revalidation import revalidate_recipe
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import linears
from tests.support.tiny.models import (
    MemoryTensors,
    TinyModel,
    input_scales,
    tiny_llama,
    tiny_recipe,
    unquantized_recipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONTENT = np.random.default_rng(0).integers(3, 99, (3, 24))
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def recipe(model: TinyModel) -> Recipe:
    """Static scales that cover just what the inputs reach on the text, and say so."""
    scales = input_scales(model, with_bos(CONTENT, model.checkpoint.bos_token_id))
    recipe = tiny_recipe(model.checkpoint, scales)
    seen = {
        name: plan.model_copy(update={"activation_amax": scales[name] * 127}) for name, plan in recipe.modules.items()
    }
    return recipe.model_copy(update={"modules": seen})


def trained(checkpoint: Checkpoint, factors: Mapping[str, float]) -> Checkpoint:
    """Return the checkpoint with some weights multiplied."""
    weights = {name: checkpoint.tensors.read(name) for name in checkpoint.tensors.shapes}
    changed = {name: weights[name] * np.float32(factor) for name, factor in factors.items()}
    return replace(checkpoint, tensors=MemoryTensors({**weights, **changed}))


def test_the_model_that_the_recipe_was_made_for_passes(model: TinyModel, recipe: Recipe) -> None:
    found = revalidate_recipe(model.checkpoint, recipe, CONTENT)
    assert found.passed
    assert (found.compared, found.windows, found.tokens) == (8, 3, 24)
    assert all(abs(increase) > 1e-6 for increase in found.increases), "rounding changes something"


@pytest.mark.parametrize(("factor", "reason"), [(3.0, "saturates"), (0.1, "too coarse")])
def test_the_input_that_drifted_is_named(model: TinyModel, recipe: Recipe, factor: float, reason: str) -> None:
    changed = trained(model.checkpoint, {f"{LAYER}.mlp.up_proj.weight": factor})
    (drifted,) = revalidate_recipe(changed, recipe, CONTENT).drifted
    assert drifted.module == f"{LAYER}.mlp.down_proj"
    assert drifted.reason.startswith(reason)
    assert drifted.growth == pytest.approx(factor, rel=1e-3)


def test_a_ratio_above_the_recipes_threshold_is_a_spike(model: TinyModel, recipe: Recipe) -> None:
    name = f"{LAYER}.mlp.down_proj"
    own = {"activations": "per-token", "activation_scale": None, "ratio": 0.5}
    modules = {**recipe.modules, name: recipe.modules[name].model_copy(update=own)}
    strict = recipe.model_copy(update={"modules": modules, "alpha": 1.01})
    (drifted,) = revalidate_recipe(model.checkpoint, strict, CONTENT).drifted
    assert (drifted.module, drifted.reason[:10], drifted.recipe_ratio) == (name, "has spikes", 0.5)
    assert revalidate_recipe(model.checkpoint, strict.model_copy(update={"criterion": "noise"}), CONTENT).passed


def test_kept_modules_do_not_drift_and_cost_nothing(model: TinyModel) -> None:
    changed = trained(model.checkpoint, {f"{LAYER}.mlp.up_proj.weight": 3.0})
    found = revalidate_recipe(changed, unquantized_recipe(model.checkpoint, prefix=(5, 7)), CONTENT)
    assert found.passed
    assert found.increases == (0.0, 0.0, 0.0)


def test_another_architecture_is_refused(recipe: Recipe) -> None:
    deeper = tiny_llama(layers=3).checkpoint
    assert f"model.layers.2.{'mlp.down_proj'}" in linears(deeper.config)
    with pytest.raises(RecipeError, match=r"of another architecture than tiny: only one of them has model.layers.2"):
        revalidate_recipe(deeper, recipe, CONTENT)
