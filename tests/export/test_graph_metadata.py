"""What a viewer of the graph finds at nodes and model."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from spike_export.artifacts.recipe import Dtype, Scheme
from spike_export.checkpoint.modules import linears
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe

KEPT: dict[str, Dtype] = {"model.layers.0.mlp.down_proj": "bfloat16"}

STATIC = Scheme()


def exported(folder: Path, *, scheme: Scheme = STATIC, dtype: Dtype = "float16") -> onnx.ModelProto:
    model = tiny_llama(biases=True)
    recipe = tiny_recipe(
        model.checkpoint, input_scales(model, np.arange(12)[None]), kept=KEPT, prefix=(1, 7), scheme=scheme
    )
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), folder)
    return onnx.load(folder / "model.onnx", load_external_data=False)


def properties(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_node_of_a_linear_says_module_precision_and_ratio(tmp_path: Path, dtype: Dtype) -> None:
    model = tiny_llama(biases=True)
    graph = exported(tmp_path / "b", dtype=dtype).graph
    names = linears(model.checkpoint.config)
    found: dict[str, set[str]] = {name: set() for name in names}
    for node in graph.node:
        owner = next((name for name in names if node.name.startswith(f"{name}.")), None)
        if owner is None:
            continue
        kept = owner in KEPT
        expected = {
            "module": owner,
            "precision": "bfloat16" if kept else "int8",
            "ratio": "900.5" if kept else "3.25",
        }
        assert properties(node) == expected, node.name
        found[owner].add(node.op_type)
    for name, kinds in found.items():
        assert {"MatMul", "Add"} <= kinds
        assert ("QuantizeLinear" in kinds) == (name not in KEPT)


def test_every_node_says_its_module(tmp_path: Path) -> None:
    for node in exported(tmp_path / "b").graph.node:
        assert node.name.startswith(properties(node)["module"] + ".")


def test_the_model_says_what_it_was_made_of(tmp_path: Path) -> None:
    proto = exported(tmp_path / "b")
    assert proto.producer_name == "spike-export"
    assert proto.producer_version
    found = {entry.key: entry.value for entry in proto.metadata_props}
    assert len(found.pop("checkpoint_sha256")) == len(found.pop("recipe_sha256")) == 64
    assert found == {
        "bundle_format": "1",
        "source_model": "tiny",
        "architecture": "llama",
        "dtype": "float16",
        "kv_cache": "dynamic",
        "linears": "bfloat16: 1, int8: 13",
        "prefix_text": "?",
        "prefix_token_ids": "1 7",
        "prefix_in": "cache",
    }


def test_an_unquantized_model_has_neither_recipe_nor_prefix(tmp_path: Path) -> None:
    export_bundle(tiny_llama().checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    proto = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False)
    keys = {entry.key for entry in proto.metadata_props}
    assert "dtype" in keys
    assert not keys & {"recipe_sha256", "prefix_text", "prefix_token_ids", "prefix_in"}
    (node,) = (node for node in proto.graph.node if node.name == "model.layers.1.mlp.up_proj.MatMul")
    assert properties(node) == {"module": "model.layers.1.mlp.up_proj", "precision": "float32"}
