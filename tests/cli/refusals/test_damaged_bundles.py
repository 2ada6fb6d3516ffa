"""Bundles damaged by hand: every command that opens one says so on one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import load_recipe, save_recipe
from spike_export.checkpoint.modules import linears
from tests.support.tiny.cli_models import call, write_model
from tests.support.tiny.models import tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = {
    "generate": ("generate", "BUNDLE", "--prompt", "12", "--max-new-tokens", "2", "--threads", "1"),
    "inspect": ("inspect", "BUNDLE"),
    "build": ("build", "BUNDLE", "--out", "PLAN", "--target", "SM86"),
    "lint": ("check", "BUNDLE", "--lint"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    model = write_model(folder / "model")
    outcome = call("export", model, "--no-quantize", "--dtype", "float32", "--out", folder / "bundle")
    assert outcome.code == 0, outcome.err
    return folder / "bundle"


def damaged_graph(bundle: Path, damage: Callable[[Any], None]) -> None:
    path = bundle / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    damage(model.graph)
    path.write_bytes(model.SerializeToString())


def two_transposes_that_feed_each_other(graph: Any) -> None:
    first = next(node for node in graph.node if node.op_type == "MatMul")
    first.input[1] = "a"
    graph.node.extend([helper.make_node("Transpose", [one], [other]) for one, other in (("a", "b"), ("b", "a"))])


def a_product_without_inputs(graph: Any) -> None:
    del next(node for node in graph.node if node.op_type == "MatMul").input[:]


def a_cast_to_nothing(graph: Any) -> None:
    graph.node.append(helper.make_node("Cast", [graph.input[0].name], ["nothing"]))


def no_logits(graph: Any) -> None:
    graph.output.remove(next(value for value in graph.output if value.name == "logits"))


def logits_without_a_shape(graph: Any) -> None:
    next(value for value in graph.output if value.name == "logits").type.tensor_type.ClearField("shape")


def a_weight_outside(graph: Any) -> None:
    place(graph, "location", "../model/model.safetensors")


def a_weight_at_no_number(graph: Any) -> None:
    place(graph, "offset", "x")


def a_weight_without_a_file(graph: Any) -> None:
    stored = next(tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    del stored.external_data[:]


def place(graph: Any, key: str, value: str) -> None:
    stored = next(tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    next(entry for entry in stored.external_data if entry.key == key).value = value


GRAPHS = {
    two_transposes_that_feed_each_other: (tuple(COMMANDS), r"value '[ab]' depends on itself"),
    a_product_without_inputs: (tuple(COMMANDS), r"\(MatMul\) has 0 of the 2 inputs that it needs"),
    a_cast_to_nothing: (tuple(COMMANDS), r"\(Cast\) lacks the attribute 'to'"),
    no_logits: (("generate",), "the graph has no output 'logits'"),
    logits_without_a_shape: (("generate",), "the graph has no output 'logits' of 3 axes"),
    a_weight_outside: (("build",), "lies outside the bundle, in ../model/model.safetensors"),
    a_weight_at_no_number: (("build",), "has no readable place in a data file"),
    a_weight_without_a_file: (("build",), "has no readable place in a data file"),
}


@pytest.mark.parametrize(
    ("damage", "command"), [(damage, name) for damage, (commands, _) in GRAPHS.items() for name in commands]
)
def test_a_damaged_graph_is_one_line(sound: Path, tmp_path: Path, damage: Callable[[Any], None], command: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(sound, bundle)
    damaged_graph(bundle, damage)
    places = {"BUNDLE": str(bundle), "PLAN": str(tmp_path / "engine.plan")}
    outcome = call(*(places.get(argument, argument) for argument in COMMANDS[command]))
    assert re.search(GRAPHS[damage][1], outcome.error), outcome.error
    assert not (tmp_path / "engine.plan").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_dim", -1),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("vocab_size", 2**40),
        ("num_key_value_heads", 0),
    ],
)
def test_a_size_that_no_model_has_is_named(sound: Path, tmp_path: Path, field: str, value: int) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(sound, bundle)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, field: value}), encoding="utf-8")
    for command in ("generate", "inspect", "build"):
        places = {"BUNDLE": str(bundle), "PLAN": str(tmp_path / "engine.plan")}
        outcome = call(*(places.get(argument, argument) for argument in COMMANDS[command]))
        assert f"manifest.json: {field}: " in outcome.error


def test_a_layer_that_the_model_does_not_have_costs_nothing(sound: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(sound, bundle)
    layers = json.loads(call("inspect", bundle, "--json").out)["nodes"]["layers"]

    def named(graph: Any) -> None:
        graph.node.append(
            helper.make_node("Identity", [graph.input[0].name], ["c"], name="model.layers.1000000000000.x")
        )

    damaged_graph(bundle, named)
    outcome = call("inspect", bundle, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["nodes"]["layers"] == layers


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number"),
        ({"max_new_tokens": 20.5}, "max_new_tokens is 20.5"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; expected true or false"),
        ({"temperature": 1e-38}, "temperature is 1e-38; expected at least 0.0001"),
        ({"top_p": True}, "top_p is True; expected a number"),
    ],
)
def test_generation_options_of_other_types_are_named(
    sound: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(sound, bundle)
    (bundle / "generation_config.json").write_text(json.dumps(options), encoding="utf-8")
    outcome = call("generate", bundle, "--prompt", "12", "--max-new-tokens", "2", "--threads", "1")
    if "max_new_tokens" in options:
        outcome = call("generate", bundle, "--prompt", "12", "--threads", "1")
    assert f"generation_config.json: {named}" in outcome.error


@pytest.mark.parametrize("scale", [1e300, 1e-300, -1.0, float("inf")])
def test_a_scale_that_float32_does_not_hold_is_refused(tmp_path: Path, scale: float) -> None:
    source = tiny_llama().checkpoint
    path = tmp_path / "recipe.json"
    save_recipe(tiny_recipe(source, dict.fromkeys(linears(source.config), 0.02)), path)
    text = path.read_text(encoding="utf-8").replace("0.02", "Infinity" if scale == float("inf") else repr(scale), 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"activation_scale"):
        load_recipe(path)
