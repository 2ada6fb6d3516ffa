"""The scale of the scores goes into the queries: where it goes, and that it is the scale."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from spike_export.artifacts.manifest import DATA_FILE, load_manifest
from spike_export.engines.onnx_runtime.attention_kernels import TILED_OFF, scores_in_rows
from spike_export.engines.onnx_runtime.generation_graph import GenerationGraph, generation_graph
from spike_export.engines.onnx_runtime.lowering.given_weights import WeightFile
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.families import tiny_family
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import TinyModel, input_scales, tiny_recipe, unquantized_recipe

LAYER = "model.layers.0.self_attn"
SCALE = 0.25
"""Of heads of 16 channels."""

TOKENS = np.random.default_rng(0).integers(3, 99, (2, 12))


def graph_of(model: TinyModel, bundle: Path, *, int8: bool, cache_int8: bool = False) -> GenerationGraph:
    recipe = (
        tiny_recipe(model.checkpoint, input_scales(model, TOKENS)) if int8 else unquantized_recipe(model.checkpoint)
    )
    if cache_int8:
        recipe = with_kv_cache(recipe, model.checkpoint, TOKENS)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32", cache=CacheOptions("static", 40)), bundle)
    return generation_graph(bundle, load_manifest(bundle))


def attention(graph: GenerationGraph) -> list[onnx.NodeProto]:
    nodes = onnx.load_from_string(graph.serialized).graph.node
    return [node for node in nodes if node.op_type == "GroupQueryAttention"]


def scales(graph: GenerationGraph) -> list[float | None]:
    return [next((each.f for each in node.attribute if each.name == "scale"), None) for node in attention(graph)]


def in_file(bundle: Path, name: str) -> NDArray[Any]:
    tensors = onnx.load(bundle / "model.onnx", load_external_data=False).graph.initializer
    return WeightFile(bundle / DATA_FILE).values(next(tensor for tensor in tensors if tensor.name == name))


def test_it_goes_into_the_scales_of_int8_weights(tmp_path: Path) -> None:
    """The products of query, key and value are packed: the queries' columns come first."""
    graph = graph_of(tiny_family("llama", hidden_size=64, head_dim=16), tmp_path / "bundle", int8=True)
    assert set(scales(graph)) == {1.0}
    names = ", ".join(f"{LAYER}.{kind}_proj.MatMul" for kind in "qkv")
    query, key = (in_file(tmp_path / "bundle", f"{LAYER}.{kind}_proj.weight_scale") for kind in "qk")
    packed = graph.weights[f"{names}.weight_scale"]
    np.testing.assert_array_equal(packed[: len(query)], query * np.float32(SCALE))
    np.testing.assert_array_equal(packed[len(query) : len(query) + len(key)], key)


def test_it_goes_into_a_bias_too(tmp_path: Path) -> None:
    graph = graph_of(tiny_family("qwen2", hidden_size=64, head_dim=16), tmp_path / "bundle", int8=True)
    bias = f"{LAYER}.q_proj.bias"
    np.testing.assert_array_equal(graph.weights[f"{bias}.scaled"], in_file(tmp_path / "bundle", bias) * SCALE)


@pytest.mark.parametrize("int8", [False, True])
def test_it_goes_into_the_gain_of_a_norm_of_queries(tmp_path: Path, int8: bool) -> None:
    graph = graph_of(tiny_family("qwen3", hidden_size=64, head_dim=16), tmp_path / "bundle", int8=int8)
    gain = next(name for name in graph.weights if name.endswith(".scaled"))
    np.testing.assert_array_equal(graph.weights[gain], in_file(tmp_path / "bundle", gain[: -len(".scaled")]) * SCALE)


def test_float32_weights_are_left_and_their_queries_multiplied(tmp_path: Path) -> None:
    graph = graph_of(tiny_family("llama", hidden_size=64, head_dim=16), tmp_path / "bundle", int8=False)
    assert graph.weights == {}
    model = onnx.load_from_string(graph.serialized)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    factors = [numpy_helper.to_array(constants[made[node.input[0]].input[1]]) for node in attention(graph)]
    assert [float(each) for each in factors] == [SCALE] * 4


def test_a_scale_of_the_models_own(tmp_path: Path) -> None:
    model = tiny_family("granite", hidden_size=64, head_dim=16, attention_multiplier=0.5)
    graph = graph_of(model, tmp_path / "bundle", int8=True)
    assert set(scales(graph)) == {1.0}
    packed = next(values for name, values in graph.weights.items() if name.startswith(LAYER) and "scale" in name)
    query = in_file(tmp_path / "bundle", f"{LAYER}.q_proj.weight_scale")
    np.testing.assert_array_equal(packed[: len(query)], query * np.float32(0.5))


def test_a_cache_in_int8_keeps_the_operators_scale(tmp_path: Path) -> None:
    model = tiny_family("llama", hidden_size=64, head_dim=16)
    graph = graph_of(model, tmp_path / "bundle", int8=False, cache_int8=True)
    assert len(attention(graph)) == 4
    assert graph.weights == {}
    assert 1.0 not in scales(graph)


def test_the_tiled_kernels_are_off_while_a_session_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TILED_OFF, raising=False)
    with scores_in_rows():
        assert os.environ[TILED_OFF] == "1"
    assert TILED_OFF not in os.environ


def test_the_users_choice_of_kernels_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TILED_OFF, "0")
    with scores_in_rows():
        assert os.environ[TILED_OFF] == "0"
    assert os.environ[TILED_OFF] == "0"
