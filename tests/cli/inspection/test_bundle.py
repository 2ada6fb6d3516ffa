"""`inspect BUNDLE`: manifest, linears, nodes and files."""

import json
import math
from pathlib import Path
from typing import Any

import onnx
import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import ModulePlan, Recipe, Scheme
from spike_export.checkpoint.modules import linears
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.export.test_mixture_of_experts import Case, mixture, recipe_of
from tests.support.tiny.cli_models import call
from tests.support.tiny.models import tiny_llama, tiny_recipe

DYNAMIC = "model.layers.0.mlp.down_proj"
WEIGHTS = "model.layers.1.self_attn.o_proj"
KEPT = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scheme: static scales, scales per token, INT8 weights alone, and none."""
    folder = tmp_path_factory.mktemp("inspect") / "b"
    source = tiny_llama().checkpoint
    scales = dict.fromkeys(linears(source.config), 0.02)
    recipe = tiny_recipe(source, scales, kept={KEPT: "float16"}, prefix=(1, 5, 7), scheme=Scheme())
    modules = {
        **recipe.modules,
        DYNAMIC: ModulePlan(precision="int8", activations="per-token"),
        WEIGHTS: ModulePlan(precision="float16", weights="int8"),
    }
    recipe = Recipe.model_construct(**{**dict(recipe), "modules": modules})
    export_bundle(source, recipe, ExportOptions("float16", cache=CacheOptions("static", 48)), folder)
    return folder


def document(bundle: Path) -> Any:
    done = call("inspect", bundle, "--json")
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


def test_the_document_holds_manifest_linears_nodes_and_files(bundle: Path) -> None:
    found = document(bundle)
    assert found["manifest"] == load_manifest(bundle).model_dump(mode="json")
    static = {"precision": "int8", "scheme": "weights per channel, inputs per tensor, static"}
    expected = dict.fromkeys(linears(tiny_llama().checkpoint.config), static) | {
        DYNAMIC: {"precision": "int8", "scheme": "weights per channel, inputs per token"},
        WEIGHTS: {"precision": "float16+int8-weights", "scheme": "weights per channel"},
        KEPT: {"precision": "float16", "scheme": None},
        "lm_head": {"precision": "float16", "scheme": None},
    }
    assert found["modules"] == expected
    assert found["files"] == {path.name: path.stat().st_size for path in bundle.iterdir()}

    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node]
    layers = [sum(name.startswith(f"model.layers.{layer}.") for name in names) for layer in range(2)]
    assert found["nodes"]["layers"] == layers
    assert found["nodes"]["outside"] == len(names) - sum(layers)
    assert sum(found["nodes"]["operators"].values()) == layers[1]
    assert found["nodes"]["operators"]["TensorScatter"] == 2


def test_the_tables_say_the_same(bundle: Path) -> None:
    done = call("inspect", bundle)
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "cache: static of 48 tokens (51 slots), float16" in lines
    assert any(line.startswith("prefix: [1, 5, 7] ") for line in lines)
    assert "mlp.down_proj int8 weights per channel, inputs per token 0" in lines
    shares = load_manifest(bundle).linears["int8"]
    sizes = tiny_llama().checkpoint.stored_shape
    macs = {name: math.prod(sizes(f"{name}.weight")) for name in linears(tiny_llama().checkpoint.config)}
    assert shares.per_token_share == pytest.approx(macs[DYNAMIC] / sum(macs.values()))
    share = f"{shares.mac_share:.1%}; inputs scaled per token: {shares.per_token_share:.1%}"
    assert f"int8 {shares.modules} {share}" in lines
    assert "mlp.down_proj float16 1" in lines
    assert "self_attn.q_proj int8 weights per channel, inputs per tensor, static 0-1" in lines
    assert "self_attn.o_proj float16+int8-weights weights per channel 1" in lines
    assert "RotaryEmbedding 2" in lines


def test_a_bundle_without_its_weights_still_tells(bundle: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "model.onnx"):
        (tmp_path / name).write_bytes((bundle / name).read_bytes())
    found = document(tmp_path)
    assert found["files"]["model.onnx.data"] is None
    assert found["modules"] == document(bundle)["modules"]
    lines = [" ".join(line.split()) for line in call("inspect", tmp_path).out.splitlines()]
    assert "model.onnx.data MISSING" in lines


def test_every_expert_of_a_mixture_is_listed(tmp_path: Path) -> None:
    """Though ONNX Runtime's graph has each in a branch, which is skipped where no token is sent to it."""
    checkpoint = mixture("mixtral").checkpoint
    recipe = recipe_of("mixtral", Case(expert=ModulePlan(precision="float16")), checkpoint, "float16")
    export_bundle(checkpoint, recipe, ExportOptions("float16"), tmp_path / "b")
    found = document(tmp_path / "b")
    modules = {name: linear["precision"] for name, linear in found["modules"].items()}
    assert modules.pop("lm_head") == "float16"
    assert modules == {name: plan.precision for name, plan in recipe.modules.items()}
    assert "If" not in found["nodes"]["operators"]


def test_a_damaged_bundle_is_an_error(bundle: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes((bundle / "manifest.json").read_bytes())
    assert "model.onnx: not a readable ONNX model" in call("inspect", tmp_path).error
    manifest.write_text("{}")
    assert "manifest.json: " in call("inspect", tmp_path).error
