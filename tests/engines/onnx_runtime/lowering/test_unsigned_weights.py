"""Weights that the graph turns into unsigned bytes give the bits that ONNX Runtime's own conversion gives."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime import generation_graph
from spike_export.engines.onnx_runtime.lowering import packed_products, unsigned_weights
from spike_export.engines.onnx_runtime.lowering.given_weights import WeightFile
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.generation_sessions import opened
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before")

TOKENS = np.random.default_rng(0).integers(3, 99, (1, 12))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = tiny_llama(), tmp_path_factory.mktemp("unsigned") / "bundle"
    options = ExportOptions("float32", logits="last", cache=CacheOptions("static", 40))
    recipe = tiny_recipe(model.checkpoint, input_scales(model, TOKENS), prefix=(5, 1))
    export_bundle(model.checkpoint, recipe, options, folder)
    return folder


def played(bundle: Path) -> tuple[generation_graph.GenerationGraph, list[NDArray[np.float32]]]:
    """Return the graph, and logits of a prompt and of a step: products of matrices and of vectors have kernels each."""
    graph = generation_graph.generation_graph(bundle, load_manifest(bundle))
    batch = opened(bundle, graph).begin(1)
    assert isinstance(batch, StaticSequences)
    return graph, [batch.admit(0, TOKENS[0]), batch.step(TOKENS[:, :1])]


@pytest.mark.parametrize("packs", [True, False])
def test_the_results_are_equal_bit_for_bit(bundle: Path, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_graph, "products_saturate", lambda: True)
    if not packs:
        monkeypatch.setattr(packed_products, "LARGEST_COPY", 0)
    graph, found = played(bundle)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(graph.serialized).graph.initializer}
    weights = [name for name in graph.weights if name.endswith("weight.unsigned")]
    assert len(weights) == (4 if packs else 7) * load_manifest(bundle).num_hidden_layers
    assert {kinds[name] for name in weights} == {onnx.TensorProto.UINT8}
    monkeypatch.setattr(unsigned_weights, "LARGEST_COPY", 0)
    left, expected = played(bundle)
    assert not any(name.endswith(".unsigned") for name in left.weights)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_are_128_higher(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_graph, "products_saturate", lambda: True)
    graph = generation_graph.generation_graph(bundle, load_manifest(bundle))
    file_graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in file_graph.initializer}
    file, name = WeightFile(bundle / "model.onnx.data"), "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(graph.weights[f"{name}.unsigned"], file.values(tensors[name]).astype(np.int16) + 128)
    assert (graph.weights[f"{name}_zero_point.unsigned"] == 128).all()


def test_a_file_with_two_links_is_read(bundle: Path, tmp_path: Path) -> None:
    """onnx itself refuses such a file; copies of a bundle are made of links."""
    for path in bundle.iterdir():
        os.link(path, tmp_path / path.name)
    assert generation_graph.generation_graph(tmp_path, load_manifest(tmp_path)).weights


def test_weights_that_cannot_be_read_are_one_line(bundle: Path, tmp_path: Path) -> None:
    tensors = onnx.load(bundle / "model.onnx", load_external_data=False).graph.initializer
    tensor = next(tensor for tensor in tensors if tensor.name.endswith("down_proj.weight"))
    (tmp_path / "model.onnx.data").write_bytes(b"short")
    for name, said in (("model.onnx.data", "the file ends before"), ("other", "it is in the file model")):
        with pytest.raises(EngineError, match=f"down_proj.weight cannot be read .*{said}.*; export the bundle again"):
            WeightFile(tmp_path / name).values(tensor)
