"""Residuals and norms are fused where the operator computes the same, and nowhere else."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime import generation_graph
from spike_export.engines.onnx_runtime.lowering.residual_norms import OPERATOR, fuse_residual_norms
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.generation_sessions import opened
from tests.support.graph_parity import assert_close
from tests.support.tiny.families import tiny_family
from tests.support.tiny.models import unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before")

FUSED = {"llama": 7, "gemma3_text": 7, "olmo2": 1}
"""Family → of nine norms: the first reads the embedding, and the last layer's second one a position of the sum.

OLMo2 norms what attention and feed-forward give, and no sum but the model's.
"""


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", FUSED)
def test_logits_are_the_same(name: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bundle = tiny_family(name), tmp_path / "bundle"
    chosen = CacheOptions("static", 40) if cache == "static" else CacheOptions("dynamic")
    options = ExportOptions("float32", cache=chosen, logits="last")
    export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint), options, bundle)
    tokens, logits, counted = np.random.default_rng(0).integers(0, 99, (1, 12)), [], []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(generation_graph, "fuse_residual_norms", lambda model: None)
        graph = generation_graph.generation_graph(bundle, load_manifest(bundle))
        counted.append(Counter(node.op_type for node in onnx.load_from_string(graph.serialized).graph.node))
        batch = opened(bundle, graph).begin(1)
        logits.append(np.concatenate([batch.step(tokens), batch.step(tokens[:, :1])]))
    assert_close(*logits)
    assert counted[0][OPERATOR] == FUSED[name]
    for operator in ("Add", "RMSNormalization"):
        assert counted[1][operator] - counted[0][operator] == FUSED[name]


def summed_and_normed(**attributes: object) -> onnx.ModelProto:
    """Return a model that adds two tensors, norms the sum and gives both."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"], name="residual"),
        helper.make_node("RMSNormalization", ["sum", "gain"], ["normed"], name="norm", **attributes),
    ]
    values = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8]) for name in "ab"}
    results = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8]) for name in ("sum", "normed")]
    gain = numpy_helper.from_array(np.ones(8, np.float32), "gain")
    graph = helper.make_graph(nodes, "graph", list(values.values()), results, [gain])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_a_sum_that_others_read_is_given_too() -> None:
    model = summed_and_normed(axis=-1, epsilon=1e-6)
    fuse_residual_norms(model)
    assert operators(model) == [OPERATOR]
    assert list(model.graph.node[0].output) == ["normed", "", "", "sum"]
    assert [each.domain for each in model.opset_import] == ["", "com.microsoft"]


@pytest.mark.parametrize(
    "attributes",
    [{"axis": 1, "epsilon": 1e-6}, {"axis": -1, "epsilon": 1e-6, "stash_type": 11}, {"axis": -1}],
    ids=["another axis", "another precision", "no epsilon"],
)
def test_another_norm_is_left(attributes: dict[str, object]) -> None:
    model = summed_and_normed(**attributes)
    fuse_residual_norms(model)
    assert operators(model) == ["Add", "RMSNormalization"]


def test_a_bias_is_no_residual() -> None:
    model = summed_and_normed(axis=-1, epsilon=1e-6)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 3, 8), np.float32), "b"))
    fuse_residual_norms(model)
    assert operators(model) == ["Add", "RMSNormalization"]
