"""The parity chain passes what is sound, and names the module or position of each planted fault."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.recipe import AttentionPlan, Dtype, HadamardPlan, Recipe, RotationPlan, Scheme
from spike_export.checkpoint.modules import block_inputs, is_router, linears
from spike_export.engines.parity import chain as chain_module
from spike_export.engines.parity.chain import Chain, bundle_link, parity_chain, unquantized_links
from spike_export.engines.parity.transformers_model import transformers_model
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.planted_faults import Fault, changed, later_positions, planted, swapped
from tests.support.tiny.families import tiny_family
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import TinyModel, input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = np.random.default_rng(0).integers(3, 99, (2, 20))
PREFIX = (5, 1, 7)
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def recipe(model: TinyModel) -> Recipe:
    scales = input_scales(model, TOKENS)
    recipe = tiny_recipe(model.checkpoint, scales, prefix=PREFIX, kept={f"{LAYER}.self_attn.o_proj": "float16"})
    name = f"{LAYER}.mlp.up_proj"
    gate = f"{LAYER}.mlp.gate_proj"
    own = {"activations": "per-token", "activation_scale": None}
    modules = {
        each: plan.model_copy(update=own if each in (name, gate) else {}) for each, plan in recipe.modules.items()
    }
    return recipe.model_copy(update={"modules": modules})


@pytest.fixture(scope="module")
def chain(model: TinyModel, recipe: Recipe) -> Chain:
    return Chain(model.checkpoint, recipe, TOKENS)


@pytest.fixture(scope="module", params=["float32", "float16"])
def bundle(
    request: pytest.FixtureRequest, model: TinyModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param) / "bundle"
    export_bundle(model.checkpoint, recipe, ExportOptions(request.param), folder)
    return folder


def test_a_sound_bundle_passes(chain: Chain, bundle: Path) -> None:
    parity = parity_chain(chain, bundle)
    assert parity.passed, parity.links
    assert all(link.compared == 2 * 15 + 2 for link in parity.links)
    assert all(0 < link.worst.excess < 0.5 for link in parity.links if link.worst)
    assert max(error for _, error in parity.links[0].growth) < 1e-5 < min(error for _, error in parity.quantization)


FAULTS: dict[str, tuple[Fault, str]] = {
    "an activation's scale is twice as large": (
        changed(f"{LAYER}.mlp.down_proj.input_scale", lambda scale: scale * 2),
        f"{LAYER}.mlp.down_proj",
    ),
    "a channel's scale is twice as large": (
        changed(f"{LAYER}.self_attn.v_proj.weight_scale", lambda scale: scale * np.where(np.arange(32) == 3, 2, 1)),
        f"{LAYER}.self_attn.v_proj",
    ),
    "a weight is transposed": (
        changed(f"{LAYER}.self_attn.k_proj.weight", lambda weight: weight.T.reshape(weight.shape)),
        f"{LAYER}.self_attn.k_proj",
    ),
    "a kept weight is transposed": (
        changed(f"{LAYER}.self_attn.o_proj.weight", lambda weight: weight.T.reshape(weight.shape)),
        f"{LAYER}.self_attn.o_proj",
    ),
    "two modules have each other's scale": (
        swapped(f"{LAYER}.self_attn.q_proj.input_scale", f"{LAYER}.mlp.down_proj.input_scale"),
        f"{LAYER}.self_attn.q_proj",
    ),
    "positions behind the prefix are one too large": (later_positions, "model.layers.0.self_attn"),
    "a layer's cached prefix is shifted": (
        changed(f"{LAYER}.self_attn.prefix_key", lambda key: np.roll(key, 1, axis=2)),
        f"{LAYER}.self_attn",
    ),
    "a norm lacks a channel's gain": (
        changed(f"{LAYER}.post_attention_layernorm.weight", lambda gain: np.where(np.arange(48) == 7, 0, gain)),
        f"{LAYER}.post_attention_layernorm",
    ),
    "a norm's gain is not a number": (
        changed(f"{LAYER}.input_layernorm.weight", lambda gain: np.where(np.arange(48) == 7, np.nan, gain)),
        f"{LAYER}.input_layernorm",
    ),
    "a token's embedding is another's": (
        changed(
            "model.embed_tokens.weight", lambda rows: np.where(np.arange(99)[:, None] == TOKENS[1, 4], rows[3], rows)
        ),
        "model.embed_tokens",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_place_of_a_fault_is_named(chain: Chain, bundle: Path, tmp_path: Path, name: str) -> None:
    fault, module = FAULTS[name]
    link, _ = bundle_link(chain, planted(bundle, tmp_path / "faulty", fault))
    assert link.outside[0].name == module


def test_the_token_of_a_fault_is_named(chain: Chain, bundle: Path, tmp_path: Path) -> None:
    fault, _ = FAULTS["a token's embedding is another's"]
    link, _ = bundle_link(chain, planted(bundle, tmp_path / "faulty", fault))
    first = link.outside[0]
    assert (first.window, first.token) == (1, 4)
    assert first.tokens == np.count_nonzero(np.equal(TOKENS, TOKENS[1, 4]))


def test_a_changed_graph_is_refused(chain: Chain, bundle: Path, tmp_path: Path) -> None:
    def rename(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.name == f"{LAYER}.self_attn.v_proj.MatMul").name = "other"

    with pytest.raises(EngineError, match=rf"no node '{LAYER}.self_attn.v_proj.MatMul'; .*again"):
        bundle_link(chain, planted(bundle, tmp_path / "renamed", rename))


def test_every_scheme_passes(model: TinyModel, tmp_path: Path) -> None:
    """Rotation, Hadamard transform, INT8 attention and head, a static cache and last-token logits, in one bundle."""
    scales = input_scales(model, TOKENS)
    scheme = Scheme(head="int8-per-token-dynamic", attention="int8-per-tensor-static", unquantized="float32")
    recipe = tiny_recipe(model.checkpoint, scales, prefix=PREFIX, scheme=scheme).model_copy(
        update={
            "rotation": RotationPlan(kind="orthogonal", seed=1),
            "hadamard": HadamardPlan(block=8),
            "input_hadamard": {"model.layers.0.self_attn.q_proj": 16, "model.layers.1.mlp.up_proj": 8},
            "attention": {f"{LAYER}.self_attn": AttentionPlan(query=0.05, key=0.05, value=0.02)},
        }
    )
    options = ExportOptions("float32", cache=CacheOptions("static", 64), logits="last")
    export_bundle(model.checkpoint, recipe, options, tmp_path / "bundle")
    parity = parity_chain(Chain(model.checkpoint, recipe, TOKENS), tmp_path / "bundle")
    assert parity.passed, parity.links


def test_a_cache_in_int8_passes_and_is_missed_where_the_recipe_has_none(model: TinyModel, tmp_path: Path) -> None:
    plain = tiny_recipe(model.checkpoint, input_scales(model, TOKENS), prefix=PREFIX)
    recipe = with_kv_cache(plain, model.checkpoint, TOKENS)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    link, _ = bundle_link(Chain(model.checkpoint, recipe, TOKENS), tmp_path / "bundle")
    assert not link.outside
    link, _ = bundle_link(Chain(model.checkpoint, plain, TOKENS), tmp_path / "bundle")
    assert link.outside[0].name == "model.layers.0.self_attn"


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "mixtral", "qwen3_moe"])
def test_other_families_pass(name: str, tmp_path: Path) -> None:
    """Soft caps and windows, norms behind the blocks, experts."""
    model = tiny_family(name, num_hidden_layers=2)
    names = linears(model.checkpoint.config)
    kept: dict[str, Dtype] = {each: "float32" for each in names if is_router(each)}
    recipe = tiny_recipe(model.checkpoint, dict.fromkeys(names, 0.05), prefix=PREFIX, kept=kept)
    spread = {f"model.layers.1.{each}": 16 for each in block_inputs(model.checkpoint.config) if each}
    recipe = recipe.model_copy(update={"hadamard": HadamardPlan(block=4), "input_hadamard": spread})
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    parity = parity_chain(Chain(model.checkpoint, recipe, TOKENS), tmp_path / "bundle")
    assert parity.passed, parity.links
    assert all(link.worst.excess > 0 and link.growth for link in (parity.links[0], parity.links[-1]))


def test_experts_are_compared_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that have each other's weights are outside, in the sum that they enter."""
    model = tiny_family("mixtral", num_hidden_layers=2)
    faulty = transformers_model(model.checkpoint)
    weights = faulty.get_parameter(f"{LAYER}.mlp.experts.down_proj")
    weights.data = weights.data.roll(1, dims=0)
    monkeypatch.setattr(chain_module, "transformers_model", lambda _: faulty)
    (of_transformers, own), _ = unquantized_links(Chain(model.checkpoint, None, TOKENS))
    assert not own.outside
    assert of_transformers.outside[0].name == LAYER


def test_a_bundle_without_quantization_passes(model: TinyModel, tmp_path: Path) -> None:
    export_bundle(model.checkpoint, None, ExportOptions("float16"), tmp_path / "bundle")
    link, _ = bundle_link(Chain(model.checkpoint, None, TOKENS), tmp_path / "bundle")
    assert link.worst is not None
    assert link.worst.excess < 0.5
