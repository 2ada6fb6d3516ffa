"""What a layer costs in nodes, operator by operator, and that none of them undoes another.

The reasons are in docs/decisions/graph-economy.md.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from spike_export.artifacts.manifest import LogitsScope
from spike_export.artifacts.recipe import Dtype, HeadScheme, ModulePlan, Recipe, Scheme
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import CachedSession, input_scales, tiny_llama, tiny_recipe

Counts = Mapping[str, int]

PLAIN: Counts = {
    "RMSNormalization": 2,
    "MatMul": 7,
    "Reshape": 4,  # heads apart for q, k, v; heads together for o
    "Transpose": 4,
    "RotaryEmbedding": 2,
    "Concat": 2,  # the cache
    "Attention": 1,
    "Sigmoid": 1,
    "Mul": 2,
    "Add": 2,
}
P1: Counts = {"QuantizeLinear": 7, "DequantizeLinear": 14}
"""A pair for each product's input, and the weight's."""
P2: Counts = {**P1, "Abs": 4, "ReduceMax": 4, "Max": 4, "Div": 8, "Mul": 7}
"""The same, and a scale for each of the four inputs, multiplied in behind each product."""
PREFIX: Counts = {"Tile": 2}

CASTS: Mapping[str, int] = {"unquantized": 4, "P1": 8, "P2": 8}
"""Of a float16 layer. Unquantized: into and out of two norms, which compute in float32. INT8: into the norms, which
feed quantizers in float32; out of q, k, v; into and out of o; out of down, whose input has been float32 since the
products of gate and up."""


def export(
    folder: Path,
    kind: str,
    dtype: Dtype,
    *,
    prefix: tuple[int, ...] = (),
    head: HeadScheme = "unquantized",
    logits: LogitsScope = "all",
) -> onnx.GraphProto:
    model = tiny_llama(biases=False)
    recipe: Recipe | None = None
    if kind != "unquantized":
        scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 24)))
        recipe = tiny_recipe(model.checkpoint, scales, prefix=prefix, scheme=Scheme(head=head, unquantized=dtype))
    if recipe is not None and kind == "P2":
        modules = dict.fromkeys(recipe.modules, ModulePlan(precision="int8", activations="per-token"))
        recipe = recipe.model_copy(update={"modules": modules})
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype, logits=logits), folder)
    graph: onnx.GraphProto = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return graph


def layer_counts(graph: onnx.GraphProto, layer: int) -> Counter[str]:
    return Counter(node.op_type for node in graph.node if node.name.startswith(f"model.layers.{layer}."))


@pytest.mark.parametrize("prefix", [(), (5, 1)], ids=["plain", "prefix"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["unquantized", "P1", "P2"])
def test_a_layer_has_these_nodes_and_no_other(tmp_path: Path, kind: str, dtype: Dtype, prefix: tuple[int, ...]) -> None:
    if kind == "unquantized" and prefix:
        pytest.skip("without a recipe there is no prefix")
    graph = export(tmp_path, kind, dtype, prefix=prefix)
    expected = (
        Counter(PLAIN) + Counter({"unquantized": {}, "P1": P1, "P2": P2}[kind]) + Counter(PREFIX if prefix else {})
    )
    expected["Cast"] = CASTS[kind] if dtype == "float16" else 0
    for layer in range(2):
        assert layer_counts(graph, layer) == +expected


HEADS: Mapping[HeadScheme, Counts] = {
    "unquantized": {"MatMul": 1},
    "int8-weights": {"DequantizeLinear": 1, "MatMul": 1},
    "int8-per-token-dynamic": {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Mul": 1},
}
TOKEN_SCALE: Counts = {"Abs": 1, "ReduceMax": 1, "Max": 1, "Div": 2}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_head_has_these_nodes_and_no_other(tmp_path: Path, head: HeadScheme, dtype: Dtype) -> None:
    graph = export(tmp_path, "P1", dtype, head=head, logits="last")
    expected = Counter(HEADS[head])
    if dtype == "float16" and head == "unquantized":
        expected["Cast"] = 1  # of the logits; a quantized head computes in float32
    assert Counter(node.op_type for node in graph.node if node.name.startswith("lm_head.")) == expected
    chosen = Counter({"Slice": 1})
    if dtype == "float16":
        chosen["Cast"] = 1  # into the norm
    norm = Counter({"RMSNormalization": 1})
    if head == "int8-per-token-dynamic":
        norm += Counter(TOKEN_SCALE)
    if dtype == "float16" and head == "unquantized":
        norm["Cast"] = 1
    assert Counter(node.op_type for node in graph.node if node.name.startswith("model.norm.")) == norm
    assert Counter(node.op_type for node in graph.node if node.name.startswith("model.last_token.")) == chosen


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["unquantized", "P1", "P2"])
def test_no_node_undoes_or_repeats_another(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    graph = export(tmp_path, kind, dtype)
    producers = {output: node for node in graph.node for output in node.output}
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for node in graph.node:
        assert set(node.output) & used, f"nothing reads {node.name}"
        before = producers.get(node.input[0])
        if node.op_type in ("Cast", "Transpose", "Reshape") and before is not None:
            assert before.op_type != node.op_type, f"{node.name} follows {before.name}"
    casts = Counter((node.input[0], node.attribute[0].i) for node in graph.node if node.op_type == "Cast")
    assert set(casts.values()) <= {1}


def test_onnx_runtime_leaves_one_node_a_product_and_one_a_quantizer(tmp_path: Path) -> None:
    export(tmp_path / "bundle", "P1", "float32", head="int8-per-token-dynamic", logits="last")
    CachedSession(tmp_path / "bundle", tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMulIntegerToFloat"] == kinds["QuantizeLinear"] == 2 * 7 + 1
    assert kinds["QuickGelu"] == 2  # Sigmoid and Mul
    assert not {"Cast", "DequantizeLinear", "Sigmoid", "MatMul"} & set(kinds)
