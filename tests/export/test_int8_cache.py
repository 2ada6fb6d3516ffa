"""A cache of keys and values in INT8: the graph computes what the simulation does, in every family and every cache."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import AttentionPlan, KvCachePlan, Recipe
from spike_export.calibration.decoder.exponents import encode_exponents
from spike_export.calibration.decoder.kv_cache import cache_steps, quantize_cache
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from spike_export.export.graph_plan import PrefixHome
from tests.support.graph_parity import PARITY, relative_error
from tests.support.tiny.families import NAMES, tiny_family
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (5, 1, 9)
STATIC, DYNAMIC = CacheOptions("static", 24), CacheOptions()

FLIPPED = 0.05
"""Part of the rounding's own effect. Graph and simulation differ in the last bits of a key, which may lie between two
steps: one of some hundred numbers is then another one. All of them rounded have an effect of 1."""


def tokens(rows: int = 2, length: int = 17, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 99, (rows, length))


def cached_recipe(model: TinyModel, prefix: tuple[int, ...] = PREFIX) -> Recipe:
    return with_kv_cache(unquantized_recipe(model.checkpoint, prefix), model.checkpoint, tokens(seed=3))


def simulated(
    model: TinyModel, recipe: Recipe, *, rounded: bool = True, prefix_cached: bool = True
) -> NDArray[np.float32]:
    plans = recipe.kv_cache if rounded else {}
    simulation = Simulation({}, QuantizedWeights("int8-per-channel"), kv_cache=plans, prefix_cached=prefix_cached)
    decoder = Decoder(model.checkpoint)
    states = decoder.run(tokens(), recipe.prefix_ids, visits=(simulation.visit,), batch_tokens=99)
    logits: NDArray[np.float32] = decoder.head().logits(states.get(0)).numpy()
    return logits


def computed(bundle: Path, chunk: int = 17) -> NDArray[np.float32]:
    sequences = open_bundle(bundle, threads=1).begin(2)
    parts = [sequences.step(tokens()[:, start : start + chunk]) for start in range(0, 17, chunk)]
    return np.concatenate(parts, axis=1)


def require_equal(actual: NDArray[np.float32], expected: NDArray[np.float32], exact: NDArray[np.float32]) -> None:
    """Compare as a part of what the rounding itself changes, which must be seen for the comparison to mean anything."""
    effect = relative_error(expected, exact)
    assert effect > 100 * PARITY
    assert relative_error(actual, expected) < FLIPPED * effect


CASES: tuple[tuple[str, CacheOptions, PrefixHome], ...] = (
    *((name, STATIC, "cache") for name in NAMES),
    *((name, DYNAMIC, "cache") for name in ("llama", "gemma2")),
    *((name, DYNAMIC, "attention") for name in ("llama", "mistral")),
)


@pytest.mark.parametrize(("name", "cache", "home"), CASES)
def test_every_family_and_cache_computes_what_is_simulated(
    name: str, cache: CacheOptions, home: PrefixHome, tmp_path: Path
) -> None:
    model = tiny_family(name)
    recipe = cached_recipe(model)
    manifest = export_bundle(
        model.checkpoint, recipe, ExportOptions("float32", cache=cache, prefix_in=home), tmp_path / "bundle"
    )
    assert (manifest.kv_cache_dtype, manifest.cache_type) == ("int8", "int8")
    caches = [value.dtype for value in (*manifest.inputs, *manifest.outputs) if "." in value.name]
    assert set(caches) == {"int8"}
    assert len(caches) == 4 * manifest.num_hidden_layers
    expected = simulated(model, recipe, prefix_cached=home == "cache")
    require_equal(computed(tmp_path / "bundle"), expected, simulated(model, recipe, rounded=False))


@pytest.mark.parametrize("cache", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
def test_chunks_and_single_tokens_find_what_earlier_calls_have_rounded(
    cache: CacheOptions, prefix: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_family("mistral")
    recipe = cached_recipe(model, prefix)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32", cache=cache), tmp_path / "bundle")
    whole = computed(tmp_path / "bundle")
    exact = simulated(model, recipe, rounded=False)
    require_equal(whole, simulated(model, recipe), exact)
    for chunk in (1, 5):
        require_equal(computed(tmp_path / "bundle", chunk), whole, exact)


def test_the_cache_holds_what_was_measured_in_steps(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    recipe = cached_recipe(model)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    session = open_bundle(tmp_path / "bundle", threads=1)
    sequences = session.begin(2)
    sequences.step(tokens())
    (block, plan), config = next(iter(recipe.kv_cache.items())), model.checkpoint.config
    steps = cache_steps(block, plan, config.num_key_value_heads, config.head_dim)
    held = [value.numpy() for value in sequences._cache]  # type: ignore[attr-defined]
    prefix = Decoder(model.checkpoint).prefix_key_values(PREFIX)[0]
    for found, exact, step in zip(held, prefix, (steps.key, steps.value), strict=True):
        assert found.dtype == np.int8
        assert found.shape == (2, config.num_key_value_heads, len(PREFIX) + 17, config.head_dim)
        rows = found[:, :, : len(PREFIX)]
        np.testing.assert_array_equal(rows, np.broadcast_to(quantize_cache(exact, step), rows.shape))
        # The steps leave a fifth of the range for other text, and the largest magnitude of a channel uses the rest.
        assert 60 < np.abs(found).max() <= 127


def test_what_exceeds_the_steps_saturates() -> None:
    states = np.array([[[1000.0, -1000.0, 0.5, 1.5]]], np.float32)
    np.testing.assert_array_equal(quantize_cache(states, np.ones((1, 1, 4), np.float32)), [[[127, -128, 0, 2]]])


def test_it_can_be_left_out(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    plain = export_bundle(
        model.checkpoint, unquantized_recipe(model.checkpoint, PREFIX), ExportOptions("float32"), tmp_path / "plain"
    )
    options = ExportOptions("float32", kv_cache_dtype="unquantized")
    left_out = export_bundle(model.checkpoint, cached_recipe(model), options, tmp_path / "left_out")
    assert plain.kv_cache_dtype == left_out.kv_cache_dtype == "unquantized"
    graphs = [
        onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph for name in ("plain", "left_out")
    ]
    assert graphs[0] == graphs[1]


def test_engines_and_runtimes_that_cannot_run_it_are_named(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    recipe = cached_recipe(model)
    static = export_bundle(model.checkpoint, recipe, ExportOptions("float16", cache=STATIC), tmp_path / "static")
    grows = export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / "dynamic")
    assert static.engines == ("onnxruntime",)
    assert grows.engines == ("onnxruntime", "tensorrt", "tensorrt-rtx")
    assert "--kv-cache-dtype unquantized" in grows.unsupported["onnxruntime-genai"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"kv_cache": {}}, {"kv_cache_dtype": "int8"}, "calibrate with --kv-cache-dtype int8"),
        ({}, {"number_format": "fp8"}, "--number-format fp8 does not go with keys and values in INT8"),
        (
            {"kv_cache": {"model.layers.7.self_attn": KvCachePlan(key="", value="")}},
            {},
            "model.layers.0.self_attn is amiss",
        ),
        (
            {"kv_cache": {"model.layers.0.self_attn": KvCachePlan(key="!", value="")}},
            {},
            "kv_cache.model.layers.0.self_attn.key: .*; calibrate again",
        ),
        (
            {"kv_cache": {"model.layers.0.self_attn": KvCachePlan(key="AAAA", value="AAAA")}},
            {},
            "3 steps for 32 channels; calibrate again",
        ),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], options: dict[str, str], message: str, tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    recipe = cached_recipe(model).model_copy(update=change)
    with pytest.raises(RecipeError, match=message):
        export_bundle(model.checkpoint, recipe, ExportOptions("float32", **options), tmp_path / "bundle")  # type: ignore[arg-type]


def test_a_recipe_rounds_keys_once() -> None:
    model = tiny_llama(layers=1)
    document = cached_recipe(model).model_dump()
    document["attention"] = {"model.layers.0.self_attn": AttentionPlan(query=1, key=1, value=1).model_dump()}
    with pytest.raises(ValueError, match="attention and kv_cache both round keys and values"):
        Recipe.model_validate(document)


def test_steps_have_the_channels_order() -> None:
    """Head after head, each with its channels."""
    exponents = np.arange(-6, 6, dtype=np.int8)
    plan = KvCachePlan(key=encode_exponents(exponents), value=encode_exponents(-exponents))
    steps = cache_steps("a", plan, 3, 4)
    np.testing.assert_allclose(steps.key, 2 ** (exponents.reshape(3, 1, 4) / 8), rtol=1e-6)
    np.testing.assert_allclose(steps.value * steps.key, np.ones((3, 1, 4)), rtol=1e-6)
