"""The written checkpoint computes what the recipe says, to whoever reads it by the format's definition alone."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from benchmarks.accuracy.compressed_reading import computed_model, config_of, stored_state
from benchmarks.accuracy.written_checkpoint import perplexity
from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.recipe import ModulePlan, Prefix, Recipe, RotationPlan, Scheme, SmoothingPlan
from spike_export.calibration.decoder.equivalent.equivalent_weights import equivalent_checkpoint, transformed_checkpoint
from spike_export.calibration.decoder.equivalent.smoothing import smoothing_plan
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import is_router, linears, representative_of
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.compressed_tensors.checkpoint_export import write_checkpoint
from spike_export.export.compressed_tensors.prefix_range import with_token_scales
from tests.support.decoder_logits import whole_logits
from tests.support.tiny.checkpoints import BOS, planted_spike_llama, sampled_text, token_of, write_hf
from tests.support.tiny.families import MIXTURES, NAMES, tiny_family, tokens
from tests.support.tiny.models import tiny_recipe

PREFIX = (BOS, token_of("\n"), token_of("\n"))


def recipe_of(checkpoint: Checkpoint, ids: NDArray[np.int64], prefix: tuple[int, ...] = (), **changes: Any) -> Recipe:
    """Every linear INT8 by what it sees: three of four inputs static, each fourth per token; one linear is kept."""
    statistics = measure_spikes(Decoder(checkpoint), ids, prefix)
    scales = {name: float(np.float32(spikes.amax / 127)) for name, spikes in statistics.modules.items()}
    names = linears(checkpoint.config)
    recipe = tiny_recipe(checkpoint, {name: scales[representative_of(name)] for name in names}, prefix=prefix)
    per_token = frozenset(list(scales)[1::4])
    modules = with_token_scales(recipe.modules, per_token)
    modules[names[-1]] = ModulePlan(precision="float32", reason="test")
    return recipe.model_copy(update={"modules": modules, **changes})


def simulated(checkpoint: Checkpoint, recipe: Recipe, ids: NDArray[np.int64]) -> torch.Tensor:
    decoder = Decoder(transformed_checkpoint(checkpoint, recipe))
    simulation = Simulation(recipe.modules, QuantizedWeights(recipe.scheme.weights))
    states = decoder.run(ids, visits=(simulation.visit,))
    return torch.cat([decoder.head().logits(states.get(index)) for index in range(len(states))])


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Allow float32 summation (some 1e-5 of the largest logit), and one rounding step where two sums straddle it."""
    error = (actual - expected).abs().amax(-1) / expected.abs().max()
    assert error.median() < 2e-5
    assert error.max() < 2e-2


@pytest.mark.parametrize("family", [name for name in NAMES if name not in MIXTURES])
def test_every_family_is_read_as_the_simulation_computes_it(tmp_path: Path, family: str) -> None:
    model, ids = tiny_family(family), tokens(2, 8)
    recipe = recipe_of(model.checkpoint, ids)
    write_checkpoint(model.checkpoint, recipe, "float32", tmp_path / "out")
    actual = whole_logits(computed_model(tmp_path / "out"), ids)
    assert_alike(actual, simulated(model.checkpoint, recipe, ids))


@pytest.mark.parametrize("weights", ["int8-per-tensor", "int8-per-channel"])
def test_rotations_and_smoothing_are_in_the_weights(tmp_path: Path, weights: Any) -> None:
    model, ids = tiny_family("llama", tie_word_embeddings=True), tokens(2, 8)
    rng = np.random.default_rng(0)
    smoothing = {
        "model.layers.0.self_attn.o_proj": _smoothing(rng, 32),
        "model.layers.1.mlp.up_proj": _smoothing(rng, 48),
        "model.layers.1.mlp.down_proj": _smoothing(rng, 80),
    }
    rotation = RotationPlan(kind="orthogonal", seed=3)
    values = {"model.layers.0.self_attn.o_proj": 16, "model.layers.2.self_attn.o_proj": 4}
    folded = equivalent_checkpoint(model.checkpoint, rotation, smoothing, None, values)
    scheme = Scheme(weights=weights)
    recipe = recipe_of(folded, ids, rotation=rotation, smoothing=smoothing, value_rotation=values, scheme=scheme)
    write_checkpoint(model.checkpoint, recipe, "float32", tmp_path / "out")
    assert_alike(whole_logits(computed_model(tmp_path / "out"), ids), simulated(model.checkpoint, recipe, ids))
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def _smoothing(rng: np.random.Generator, channels: int) -> SmoothingPlan:
    return smoothing_plan("smoothquant", 0.5, np.exp2(rng.uniform(-2, 2, channels)).astype(np.float32))


@pytest.fixture(scope="module")
def spiking(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_hf(tmp_path_factory.mktemp("model"), planted_spike_llama())))


def prefixed_recipe(checkpoint: Checkpoint) -> tuple[Recipe, NDArray[np.int64]]:
    ids = np.random.default_rng(1).integers(40, 120, (2, 12))
    ids[:, 5] = token_of("\n")
    recipe = recipe_of(checkpoint, ids, PREFIX)
    assert recipe.prefix is not None
    return recipe.model_copy(update={"prefix": Prefix(token_ids=PREFIX, text="?", ratio=1.0)}), ids


def test_inputs_that_the_prefix_exceeds_are_scaled_per_token(tmp_path: Path, spiking: Checkpoint) -> None:
    """The planted spike is the prefix's: a static scale of what follows would clip it away."""
    recipe, ids = prefixed_recipe(spiking)
    written = write_checkpoint(spiking, recipe, "float32", tmp_path / "out")
    assert "model.layers.1.mlp.down_proj" in written.exceeded
    assert written.per_token > sum(plan.per_token for plan in recipe.modules.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab").input_ids[:3] == list(PREFIX)
    full = np.concatenate([np.tile(np.array(PREFIX), (len(ids), 1)), ids], axis=1)
    actual = whole_logits(computed_model(tmp_path / "out"), full)
    moved = recipe.model_copy(update={"modules": with_token_scales(recipe.modules, frozenset(written.exceeded))})
    assert_alike(actual, simulated(spiking, moved, full))


def test_the_library_and_transformers_load_it(tmp_path: Path, spiking: Checkpoint) -> None:
    compressed = pytest.importorskip("compressed_tensors.quantization", reason="needs the package compressed-tensors")
    from transformers import AutoModelForCausalLM

    recipe, ids = prefixed_recipe(spiking)
    write_checkpoint(spiking, recipe, "float32", tmp_path / "out")
    document = config_of(tmp_path / "out")["quantization_config"]
    config = compressed.QuantizationConfig.model_validate(document)
    assert config.quant_method == "compressed-tensors"
    assert {group.input_activations.strategy for group in config.config_groups.values()} == {"tensor", "token"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.layers[0].mlp.up_proj.quantization_scheme is not None
    assert getattr(loaded.get_submodule(linears(spiking.config)[-1]), "quantization_scheme", None) is None
    assert_alike(whole_logits(loaded, ids), whole_logits(computed_model(tmp_path / "out", token_range=127.5), ids))


def test_loaded_by_the_library_it_has_the_bundles_perplexity(tmp_path: Path, spiking: Checkpoint) -> None:
    """The library quantizes the prefix too, and divides by 127.5 where the bundle divides by 127."""
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from transformers import AutoModelForCausalLM

    content = sampled_text(planted_spike_llama(), lines=8)
    recipe = recipe_of(spiking, content, PREFIX)
    assert recipe.prefix is not None
    recipe = recipe.model_copy(update={"prefix": Prefix(token_ids=PREFIX, text="?", ratio=1.0)})
    write_checkpoint(spiking, recipe, "float32", tmp_path / "out")
    export_bundle(spiking, recipe, ExportOptions("float32"), tmp_path / "bundle")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = torch.from_numpy(open_bundle(tmp_path / "bundle").prefill(content))
    full = np.concatenate([np.tile(np.array(PREFIX), (len(content), 1)), content], axis=1)
    assert perplexity(whole_logits(loaded, full), content) == pytest.approx(perplexity(ours, content), rel=0.01)
    # Steps that are much too wide would be seen.
    wide = {
        name: plan.model_copy(update={"activation_scale": 30 * plan.activation_scale})
        if plan.activation_scale
        else plan
        for name, plan in recipe.modules.items()
    }
    spoilt = perplexity(simulated(spiking, recipe.model_copy(update={"modules": wide}), full), content)
    assert spoilt > 1.02 * perplexity(ours, content)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_share_one_expression(tmp_path: Path, family: str) -> None:
    model, ids = tiny_family(family), tokens(4, 16)
    recipe = recipe_of(model.checkpoint, ids)
    modules = {
        name: plan.model_copy(update={"activations": "per-token"}) if "expert" in name else plan
        for name, plan in recipe.modules.items()
    }
    last = [name for name in modules if ".experts." in name and name.startswith("model.layers.3.")]
    kept = ModulePlan(precision="float32", reason="test")
    modules |= {name: kept for name in modules if is_router(name) or name in last}
    recipe = recipe.model_copy(update={"modules": modules})
    write_checkpoint(model.checkpoint, recipe, "float32", tmp_path / "out")
    block = "mlp" if family == "qwen3_moe" else r"block_sparse_moe"
    document = config_of(tmp_path / "out")["quantization_config"]
    assert rf"re:model\.layers\.3\.{block}\.experts\..+" in document["ignore"]
    (per_token,) = [
        group["targets"] for group in document["config_groups"].values() if group["input_activations"]["dynamic"]
    ]
    assert rf"re:model\.layers\.0\.{block}\.experts\..+" in per_token
    state = stored_state(tmp_path / "out")
    name = next(name for name in modules if ".experts.1." in name)
    restored = state[f"{name}.weight"].float() * state[f"{name}.weight_scale"]
    original = torch.from_numpy(model.checkpoint.tensor(f"{name}.weight"))
    assert ((restored - original).abs() <= 0.5001 * state[f"{name}.weight_scale"]).all()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    model, ids = tiny_family("qwen2"), tokens(2, 8)
    recipe = recipe_of(model.checkpoint, ids)
    for name in ("one", "two"):
        write_checkpoint(model.checkpoint, recipe, "bfloat16", tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert json.loads(one["spike_export.json"])["files"] == sorted(set(one) - {"spike_export.json"})
    state: Mapping[str, torch.Tensor] = stored_state(tmp_path / "one")
    assert state["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16


def test_a_model_without_tokenizer_cannot_have_a_prefix(tmp_path: Path, spiking: Checkpoint) -> None:
    recipe, _ = prefixed_recipe(spiking)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        write_checkpoint(replace(spiking, tokenizer=None), recipe, "float32", tmp_path / "out")
    assert not (tmp_path / "out").exists()
