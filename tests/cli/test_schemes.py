"""The quantization schemes from the command line to a bundle that runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import Recipe, load_recipe
from spike_export.engines.onnx_runtime.session import open_bundle
from tests.support.tiny.checkpoints import BOS, PLANTED_MODULE
from tests.support.tiny.cli_models import SMALL, call, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("schemes"))


def exported(folder: Path, place: Path, *options: str) -> Recipe:
    """Calibrate, export in float32, and compare the bundle with the model; return the recipe."""
    corpus = ("--corpus", folder / "corpus.txt", *SMALL[2:])
    command = ("calibrate", folder / "model", "--work-dir", place / "run", *corpus, *SMALL[:2], "--dtype", "float32")
    calibrated = call(*command, *options)
    assert calibrated.code == 0, calibrated.err
    recipe = place / "run" / "recipe.json"
    assert call("export", folder / "model", "--recipe", recipe, "--out", place / "bundle").code == 0
    logits = open_bundle(place / "bundle").prefill(np.arange(40, 60)[None])
    assert np.isfinite(logits).all()
    checked = call("check", place / "bundle", "--reference", folder / "model", *corpus, "--max-ppl-increase", "0.05")
    assert checked.code == 0, checked.out + checked.err
    return load_recipe(recipe)


def test_scales_per_token(folder: Path, tmp_path: Path) -> None:
    recipe = exported(folder, tmp_path, "--activations", "per-token")
    assert recipe.activations() == "per-token"
    assert {plan.precision for plan in recipe.modules.values()} == {"int8"}
    assert {(plan.static_scale, plan.clip) for plan in recipe.modules.values()} == {(None, None)}
    assert load_manifest(tmp_path / "bundle").linears["int8"].modules == len(recipe.modules)


def test_weights_of_kept_modules_in_int8(folder: Path, tmp_path: Path) -> None:
    method = ("--no-smoothing", "--activation-range", "max", "--no-qfep", "--max-fp16-modules", "1")
    recipe = exported(folder, tmp_path, "--excluded-weights", "int8", *method)
    plan = recipe.modules[PLANTED_MODULE]
    assert (plan.precision, plan.weights, plan.activation_scale) == ("float32", "int8", None)
    assert [name for name, each in recipe.modules.items() if each.weights] == [PLANTED_MODULE]
    explained = json.loads(call("inspect", tmp_path / "run", "--json", "--explain", PLANTED_MODULE).out)
    assert explained[PLANTED_MODULE]["precision"] == "float32 products of INT8 weights"


def test_products_of_attention_in_int8(folder: Path, tmp_path: Path) -> None:
    recipe = exported(folder, tmp_path, "--attention", "int8-per-tensor-static")
    assert list(recipe.attention) == [f"model.layers.{index}.self_attn" for index in range(3)]
    assert all(min(plan.query, plan.key, plan.value) > 0 for plan in recipe.attention.values())
    assert recipe.prefix is not None
    assert recipe.prefix_ids[0] == BOS


def test_all_at_once_behind_a_rotation(folder: Path, tmp_path: Path) -> None:
    recipe = exported(
        folder,
        tmp_path,
        *("--activations", "per-token", "--excluded-weights", "auto"),
        *("--attention", "int8-per-tensor-static", "--rotation", "always", "--max-fp16-modules", "2"),
    )
    assert recipe.rotation is not None
    assert 0 < len(recipe.kept()) <= 2
    (chosen,) = (each.weights for each in recipe.search.kept_weights if each.verdict == "chosen")
    assert recipe.scheme.excluded_weights == chosen
    held = {plan.weights for name, plan in recipe.modules.items() if name in recipe.kept()}
    assert held == ({"int8"} if chosen == "int8" else {None})
    assert "weights of the modules in 16 bit" in call("inspect", tmp_path / "run").out


def test_several_devices_and_streamed_layers_change_no_byte(folder: Path, tmp_path: Path) -> None:
    places = {
        "one": (),
        "two": ("--device", "cpu", "--device", "cpu"),
        "streamed": ("--layers", "streamed"),
    }
    for name, options in places.items():
        command = ("calibrate", folder / "model", "--work-dir", tmp_path / name, "--corpus", folder / "corpus.txt")
        assert call(*command, *SMALL, *options, "--quiet").code == 0
    for name in ("spikes.safetensors", "spikes_smoothed.safetensors", "smoothing.json", "recipe.json"):
        assert len({(tmp_path / place / name).read_bytes() for place in places}) == 1, name


def test_keys_and_values_in_int8(folder: Path, tmp_path: Path) -> None:
    recipe = exported(folder, tmp_path, "--kv-cache-dtype", "int8")
    assert list(recipe.kv_cache) == [f"model.layers.{index}.self_attn" for index in range(3)]
    assert load_manifest(tmp_path / "bundle").kv_cache_dtype == "int8"
    given = (folder / "model", "--recipe", tmp_path / "run" / "recipe.json", "--out", tmp_path / "left_out")
    assert call("export", *given, "--kv-cache-dtype", "unquantized").code == 0
    assert load_manifest(tmp_path / "left_out").kv_cache_dtype == "unquantized"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no-quantize",), "--kv-cache-dtype int8 and --no-quantize contradict each other"),
        (("--number-format", "fp8"), "does not go with --number-format fp8"),
        (("--kv-cache", "static", "--capacity", "64"), "TensorRT does not write into a static cache in INT8"),
        (("--attention", "int8-per-tensor-static"), "both round keys and values; give one"),
    ],
)
def test_what_an_int8_cache_does_not_go_with(
    folder: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    refused = call(folder / "model", "--out", tmp_path / "engine.plan", "--kv-cache-dtype", "int8", *options)
    assert refused.code == 2
    assert message in refused.error
