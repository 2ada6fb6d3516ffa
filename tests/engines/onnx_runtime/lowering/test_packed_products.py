"""Packed products give the bits that single ones give, and products that differ in one bit of a scale stay alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime import generation_graph
from spike_export.engines.onnx_runtime.lowering import packed_products
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.generation_sessions import opened
from tests.support.tiny.families import tiny_family
from tests.support.tiny.models import TinyModel, input_scales, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before")

TOKENS = np.random.default_rng(0).integers(3, 99, (2, 12))

SPLIT = {"llama": 4, "qwen2": 8, "qwen3": 8}
"""Family → packed products whose result is split: gate and up, and query, key and value with a bias or a norm."""

LAYERS = 4


@pytest.fixture(autouse=True)
def signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let weights be signed on every processor."""
    monkeypatch.setattr(generation_graph, "products_saturate", lambda: False)


def exported(model: TinyModel, folder: Path, changed: str = "", factor: float = 1.0, static: bool = True) -> Path:
    """Write an INT8 bundle; of one module the scale is changed."""
    scales = input_scales(model, TOKENS)
    if changed:
        scales[changed] = float(np.float32(scales[changed]) * np.float32(factor))
    cache = CacheOptions("static", 40) if static else CacheOptions("dynamic")
    options = ExportOptions("float32", logits="last", cache=cache)
    export_bundle(model.checkpoint, tiny_recipe(model.checkpoint, scales, prefix=(5, 1)), options, folder)
    return folder


def nodes(bundle: Path) -> Counter[str]:
    graph = generation_graph.generation_graph(bundle, load_manifest(bundle)).serialized
    return Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)


def played(bundle: Path) -> list[NDArray[np.float32]]:
    """Return logits of prompts, of a step of both rows, and of one row."""
    batch = opened(bundle, generation_graph.generation_graph(bundle, load_manifest(bundle))).begin(2)
    if not isinstance(batch, StaticSequences):
        return [batch.step(TOKENS), batch.step(TOKENS[:, :1])]
    logits = [batch.admit(0, TOKENS[0]), batch.admit(1, TOKENS[1, :5])]
    return [*logits, batch.step(TOKENS[:, :1]), batch.step_first(TOKENS[:1, 1:2], np.ones(1, np.int64))]


@pytest.mark.parametrize("name", SPLIT)
def test_the_results_are_equal_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported(tiny_family(name, hidden_size=64, head_dim=16), tmp_path / "bundle")
    packed, found = nodes(bundle), played(bundle)
    monkeypatch.setattr(packed_products, "LARGEST_COPY", 0)
    single = nodes(bundle)
    for kind in ("MatMul", "QuantizeLinear"):
        assert single[kind] - packed[kind] == 3 * LAYERS  # two of query, key and value, one of gate and up
    assert packed["Split"] - single["Split"] == SPLIT[name]
    for one, other in zip(found, played(bundle), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_growing_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported(tiny_family("llama"), tmp_path / "bundle", static=False)
    found, packed = played(bundle), nodes(bundle)
    monkeypatch.setattr(packed_products, "LARGEST_COPY", 0)
    assert packed["Split"] == nodes(bundle)["Split"] + 2 * LAYERS
    for one, other in zip(found, played(bundle), strict=True):
        np.testing.assert_array_equal(one, other)
    assert generation_graph.generation_graph(bundle, load_manifest(bundle), lowering=False).weights == {}


def test_a_scale_of_its_own_is_left(tmp_path: Path) -> None:
    """One bit in the scale of a key: query and value are packed without it."""
    model, name = tiny_family("llama", hidden_size=64, head_dim=16), "model.layers.1.self_attn.k_proj"
    bundle = exported(model, tmp_path / "bundle", name, 1 + 2**-23)
    graph = generation_graph.generation_graph(bundle, load_manifest(bundle))
    of_layer = [names for names in graph.weights if "layers.1.self_attn" in names]
    assert len(of_layer) == 3  # weights, scales and zero points of one product
    assert all("q_proj" in names and "v_proj" in names and "k_proj" not in names for names in of_layer)
    kinds = nodes(bundle)
    assert kinds["GroupQueryAttention"] == 4


def test_weights_are_the_files_side_by_side(tmp_path: Path) -> None:
    model = tiny_family("llama", hidden_size=64, head_dim=16)
    bundle = exported(model, tmp_path / "bundle")
    file = onnx.load(bundle / "model.onnx")
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    packed = generation_graph.generation_graph(bundle, load_manifest(bundle)).weights
    layer = "model.layers.0.mlp"
    together = packed[f"{layer}.gate_proj.MatMul, {layer}.up_proj.MatMul.weight"]
    parts = [tensors[f"{layer}.{kind}_proj.weight"] for kind in ("gate", "up")]
    np.testing.assert_array_equal(together, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("inputs", [[], ["a"], ["a", "b", "c"]], ids=len)
def test_a_damaged_product_is_left_to_onnx_runtime(inputs: list[str]) -> None:
    node = onnx.helper.make_node("MatMul", inputs, ["product"])
    result = onnx.helper.make_tensor_value_info("product", onnx.TensorProto.FLOAT, [1])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "damaged", [], [result]))
    before = model.SerializeToString()
    assert packed_products.pack_products(model, onnx.numpy_helper.to_array) == {}
    assert model.SerializeToString() == before
