"""The tuning of constants: LSQ's gradient, a model that gradients reach, and training that comes closer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.accuracy import tuning, unseen_text
from benchmarks.accuracy.tuning import Constants, Trainee, rounded_per_token, rounded_with
from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.simulate import (
    QuantizedWeights,
    Simulation,
    fake_quantize,
    fake_quantize_tokens,
)
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import linears
from tests.support.tiny.models import tiny_llama, tiny_recipe

PREFIX = (1, 7)
DOWN = "model.layers.0.mlp.down_proj"


def tiny_checkpoint() -> Checkpoint:
    checkpoint = tiny_llama().checkpoint
    return replace(checkpoint, config=replace(checkpoint.config, bos_token_id=1))


def coarse_recipe(checkpoint: Checkpoint) -> Recipe:
    """Scales that are several times too coarse, and one input with a scale per token."""
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.5), prefix=PREFIX)
    per_token = recipe.modules[DOWN].model_copy(update={"activations": "per-token"})
    return recipe.model_copy(update={"modules": {**recipe.modules, DOWN: per_token}})


def trainee_of(checkpoint: Checkpoint, recipe: Recipe) -> Trainee:
    weights = Simulation(unseen_text.variants(recipe)[unseen_text.WEIGHTS], QuantizedWeights("int8-per-channel"))
    decoder = Decoder(checkpoint)
    return Trainee(decoder, recipe.modules, weights, Constants.of(decoder, recipe.modules, recipe.prefix_ids))


def test_a_scale_has_the_gradient_of_lsq() -> None:
    values = torch.tensor([0.0, 0.3, -1.6, 25.3, 25.9, -25.45, -25.7, 90.0, -90.0], requires_grad=True)
    scale = torch.tensor(0.2, requires_grad=True)
    weights = torch.arange(1.0, 10.0)
    (rounded_with(values, scale) * weights).sum().backward()
    steps = values.detach().double().numpy() / np.float64(np.float32(0.2))
    inside = (steps > -128) & (steps < 127)
    # arXiv 1902.08153, equation 3: round(v / s) - v / s inside, and the bound where the value saturates.
    expected = np.where(inside, np.round(steps) - steps, np.where(steps < 0, -128, 127))
    assert scale.grad is not None
    assert values.grad is not None
    assert float(scale.grad) == pytest.approx(float((expected * weights.numpy()).sum()), rel=1e-5)
    assert values.grad.numpy() == pytest.approx(weights.numpy() * inside)
    assert inside.sum() == 5


def test_rounding_with_gradients_rounds_as_the_simulation_does() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32))
    # The sum of a value and its rounding error may miss the whole number by one unit in its last place.
    torch.testing.assert_close(
        rounded_with(values, torch.tensor(0.013)), fake_quantize(values, 0.013), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(rounded_per_token(values), fake_quantize_tokens(values), rtol=0, atol=5e-7)


def test_what_is_trained_computes_what_is_judged() -> None:
    checkpoint, content = tiny_checkpoint(), np.random.default_rng(0).integers(3, 99, (1, 20))
    recipe = coarse_recipe(checkpoint)
    trainee = trainee_of(checkpoint, recipe)
    with torch.no_grad():
        found = trainee.outputs(content[0], PREFIX, quantized=True)
        plain = trainee.outputs(content[0], PREFIX, quantized=False)
    simulated = Simulation(recipe.modules, QuantizedWeights("int8-per-channel"))
    expected = Decoder(checkpoint).run(content, PREFIX, visits=(simulated.visit,)).get(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((plain - expected).abs().max()) > 0.01
    assert torch.equal(plain, Decoder(checkpoint).run(content, PREFIX).get(0))


def test_tuning_brings_coarse_scales_closer_to_the_unquantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SCALE_RATE", 0.1)  # far in few steps
    checkpoint, content = tiny_checkpoint(), np.random.default_rng(0).integers(3, 99, (4, 20))
    recipe = coarse_recipe(checkpoint)
    judge = unseen_text.Judge(checkpoint, {"text": content[2:]})
    rows = tuning.evaluate(judge, recipe, recipe.modules, content[:2], steps=24)
    found = {variant: float(each.divergence.mean()) for _, variant, each in rows}
    given, per_token = found.pop(tuning.AS_GIVEN), found.pop(unseen_text.PER_TOKEN)
    neutral = found.pop(tuning.NEUTRAL)
    assert list(found) == [tuning.LAYERS, tuning.SCALES, tuning.PREFIX]
    assert per_token < min(found.values())
    assert max(found.values()) < given / 2
    assert found[tuning.PREFIX] != found[tuning.SCALES]
    assert 0 < neutral < 0.1 * given


def test_only_what_is_asked_for_is_trained() -> None:
    checkpoint, content = tiny_checkpoint(), np.random.default_rng(0).integers(3, 99, (2, 20))
    recipe = coarse_recipe(checkpoint)
    for with_prefix in (False, True):
        trainee = trainee_of(checkpoint, recipe)
        constants = trainee.constants.wanted(with_prefix)
        before = [pair.key.detach().clone() for pair in constants.prefix]
        tuning.tune(trainee, content, PREFIX, steps=1)
        changed = [not torch.equal(old, pair.key) for old, pair in zip(before, constants.prefix, strict=True)]
        assert changed == [with_prefix] * checkpoint.config.num_hidden_layers
        plans = constants.in_plans(recipe.modules)
        moved = {name for name, plan in plans.items() if plan.activation_scale != recipe.modules[name].activation_scale}
        assert moved == set(recipe.modules) - {DOWN}
        assert plans[DOWN] == recipe.modules[DOWN]
