"""What each input causes is how far a model is off that is quantized there alone, or everywhere else."""

from collections.abc import Collection

import pytest

from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.decoder.perplexity import Score, reference_states, window_scores
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.methods.attribution import attribute
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.qfem import ModuleChoice
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.checkpoint.modules import representatives, siblings
from tests.support.tiny.families import tiny_family, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX, LENGTH = (0, 7), 24
KEPT, PER_TOKEN = "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"
CASES = ("model.layers.0.self_attn.q_proj", PER_TOKEN, "model.layers.3.mlp.up_proj")
CHECKPOINT = tiny_family("llama").checkpoint
CONTENT = tokens(rows=3, length=LENGTH)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Static scales, a scale per token at one input, and one module that is not quantized."""
    options = CalibrationOptions(samples=3, length=LENGTH + 1, activations="static")
    calibration = Calibration(CHECKPOINT, TokenWindows(CONTENT, CONTENT), options)
    statistics = calibration.measure(PREFIX)
    return build_recipe(
        calibration, Corpus("test", ("text",)), statistics, ModuleChoice(1.0, (KEPT,)), per_token=(PER_TOKEN,)
    )


def divergence(recipe: Recipe, quantized: Collection[str]) -> float:
    """Return how far the model is off in which the readers of some inputs are quantized."""
    decoder = Decoder(CHECKPOINT)
    readers = {reader for name in quantized for reader in siblings(name)}
    plans = {name: plan for name, plan in recipe.modules.items() if name in readers}
    visit = Simulation(plans, QuantizedWeights("int8-per-channel")).visit
    reference = reference_states(decoder, CONTENT, LENGTH, PREFIX)
    return Score.of(window_scores(decoder, CONTENT, LENGTH, PREFIX, (visit,), reference=reference)).divergence


@pytest.mark.parametrize("streamed", [False, True])
def test_each_input_is_measured_alone_and_left_out(recipe: Recipe, streamed: bool) -> None:
    execution = Execution(resident=False, activation_bytes=1) if streamed else Execution()
    found = attribute(Decoder(CHECKPOINT, execution), QuantizedWeights("int8-per-channel"), recipe, CONTENT, LENGTH)
    quantized = set(representatives(CHECKPOINT.config)) - {KEPT}
    assert found.inputs.keys() == quantized
    assert found.windows == len(CONTENT)
    assert found.divergence == pytest.approx(divergence(recipe, quantized), rel=1e-4)
    for name in CASES:
        assert found.inputs[name].alone == pytest.approx(divergence(recipe, {name}), rel=1e-3), name
        assert found.inputs[name].without == pytest.approx(divergence(recipe, quantized - {name}), rel=1e-3), name
