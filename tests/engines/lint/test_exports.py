"""What this package exports is clean, and what other tools write is judged as it should be."""

import importlib.util
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.recipe import AttentionPlan, Dtype, ModulePlan, Recipe, Scheme
from spike_export.checkpoint.modules import linears
from spike_export.engines.lint.finding import Finding
from spike_export.engines.lint.linter import lint_model
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.lint_graphs import FLOAT, graph, node, save, stored, value
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import LLAMA3_ROPE, TinyModel, tiny_llama, tiny_recipe

DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Export:
    """A scheme and the notes, and only notes, that its float16 graph deserves."""

    notes: Mapping[str, int]
    scheme: Scheme = field(default_factory=Scheme)
    per_token: bool = False
    weights_only: bool = False
    attention: bool = False
    kv_cache: bool = False
    kept: bool = False
    prefix: tuple[int, ...] = (5, 1, 9)
    quantize: bool = True
    biases: bool = False
    sliding_window: int | None = None


EXPORTS: Mapping[str, Export] = {
    "static": Export({}),
    "without prefix": Export({}, prefix=()),
    "per tensor": Export({}, scheme=Scheme(weights="int8-per-tensor")),
    "per token": Export({}, per_token=True),
    "weights only": Export({"weights-only": 14}, weights_only=True),
    "attention": Export({"attention-operands-quantized": 2}, attention=True),
    "INT8 cache": Export({"attention-operands-quantized": 2}, kv_cache=True),
    "kept": Export({}, kept=True),
    "biases": Export({}, biases=True),
    "sliding window": Export({}, sliding_window=6),
    "unquantized": Export({}, quantize=False, prefix=()),
}


def recipe_of(case: Export, model: TinyModel, dtype: Dtype) -> Recipe | None:
    if not case.quantize:
        return None
    names = linears(model.checkpoint.config)
    base = tiny_recipe(model.checkpoint, dict.fromkeys(names, 0.02), prefix=case.prefix, scheme=case.scheme)
    modules = dict(base.modules)
    if case.per_token:
        modules = dict.fromkeys(names, ModulePlan(precision="int8", activations="per-token"))
    if case.weights_only:
        modules = dict.fromkeys(names, ModulePlan(precision=dtype, weights="int8"))
    if case.kept:
        modules[DOWN] = ModulePlan(precision=dtype, reason="test")
    blocks = [f"model.layers.{layer}.self_attn" for layer in range(model.checkpoint.config.num_hidden_layers)]
    plan = AttentionPlan(query=0.02, key=0.02, value=0.02)
    attention = dict.fromkeys(blocks, plan) if case.attention else {}
    recipe = base.model_copy(update={"modules": modules, "attention": attention})
    return with_kv_cache(recipe, model.checkpoint, np.full((1, 8), 3)) if case.kv_cache else recipe


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", EXPORTS)
def test_our_own_bundles_have_neither_errors_nor_warnings(tmp_path: Path, name: str, dtype: Dtype) -> None:
    case = EXPORTS[name]
    model = tiny_llama(biases=case.biases, sliding_window=case.sliding_window, rope=LLAMA3_ROPE)
    export_bundle(model.checkpoint, recipe_of(case, model, dtype), ExportOptions(dtype), tmp_path / "bundle")
    report = lint_model(tmp_path / "bundle")
    assert report.passed
    # float32 is for ONNX Runtime: both attentions get a note that TensorRT has no fused kernel.
    notes = dict(case.notes) | ({"attention-float32": 2} if dtype == "float32" else {})
    assert Counter(finding.rule for finding in report.findings) == notes
    assert {finding.severity for finding in report.findings} <= {"note"}


def test_a_fault_in_a_bundle_is_found_with_its_module(tmp_path: Path) -> None:
    """The rules are not silent because they do not understand the graph."""
    model = tiny_llama()
    export_bundle(
        model.checkpoint, recipe_of(EXPORTS["static"], model, "float16"), ExportOptions("float16"), tmp_path / "bundle"
    )
    path = tmp_path / "bundle" / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    nodes = {made.name: made for made in proto.graph.node}
    nodes[f"{DOWN}.DequantizeLinear_weight"].attribute[0].i = 0
    for made in proto.graph.node:
        made.input[:] = [name.replace("k_proj.input_zero_point", "q_proj.input_zero_point") for name in made.input]
    nodes["model.layers.0.self_attn.Attention"].attribute.add(name="is_causal", type=onnx.AttributeProto.INT, i=1)
    path.write_bytes(proto.SerializeToString())
    assert {(f.rule, f.module) for f in lint_model(tmp_path / "bundle").findings} == {
        ("weight-scale-per-input", DOWN),
        ("scale-count", DOWN),  # the weight is not square
        ("merged-quantizers", "model.layers.0.self_attn.q_proj"),
        ("merged-quantizers", "model.layers.1.self_attn.q_proj"),
        ("attention-causal", "model.layers.0.self_attn"),
    }


class Batches:
    """Calibration data for onnxruntime.quantization."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.batches = [random.uniform(-1, 3, (2, 8, 64)).astype(np.float32) for _ in range(3)]

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return {"x": self.batches.pop()} if self.batches else None


def projections(folder: Path) -> Path:
    """x → LayerNormalization → three products, as q, k and v, each with a bias; their sum and x."""
    random = np.random.default_rng(0)
    tensors = [stored("gain", np.ones(64), np.float32), stored("shift", np.zeros(64), np.float32)]
    nodes = [node("LayerNormalization", ["x", "gain", "shift"], ["h"])]
    for name in "abc":
        tensors.append(stored(f"w_{name}", random.standard_normal((64, 64)), np.float32))
        nodes.append(node("MatMul", ["h", f"w_{name}"], [f"y_{name}"]))
    nodes += [
        node("Mul", ["y_a", "y_b"], ["ab"]),
        node("Add", ["ab", "y_c"], ["abc"]),
        node("Add", ["x", "abc"], ["s"]),
    ]
    nodes += [node("Sigmoid", ["s"], ["gate"]), node("Mul", ["s", "gate"], ["y"])]
    shape = ["batch", "sequence", 64]
    model = graph(nodes, [value("x", FLOAT, shape)], [value("y", FLOAT, shape)], tensors, opset=21, ir_version=10)
    return save(model, folder, "float.onnx")


def by_rule(findings: tuple[Finding, ...]) -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for finding in findings:
        rules.setdefault(finding.rule, []).append(finding.node)
    return rules


def test_what_onnxruntime_quantizes_by_default_is_no_graph_for_tensorrt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from onnxruntime.quantization import quantize_static

    caplog.set_level(logging.ERROR)  # it recommends a preprocessing step
    source = projections(tmp_path)
    quantize_static(str(source), str(tmp_path / "model.onnx"), Batches())
    found = by_rule(lint_model(tmp_path / "model.onnx").findings)
    assert found["shared-quantizer"] == ["h_QuantizeLinear"]
    assert found["residual-quantized"]
    assert "x_QuantizeLinear" in found["zero-point-not-zero"]
    assert found["int32-bias"] == ["shift_DequantizeLinear"]
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    quantize_static(str(source), str(tmp_path / "symmetric.onnx"), Batches(), per_channel=True, extra_options=options)
    report = lint_model(tmp_path / "symmetric.onnx")
    assert report.passed
    assert by_rule(report.findings)["shared-quantizer"] == ["h_QuantizeLinear"]


def test_what_onnxruntime_quantizes_dynamically_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from onnxruntime.quantization import quantize_dynamic

    caplog.set_level(logging.ERROR)
    quantize_dynamic(str(projections(tmp_path)), str(tmp_path / "model.onnx"))
    found = by_rule(lint_model(tmp_path / "model.onnx").findings)
    assert len(found["operator-missing"]) == 4  # one DynamicQuantizeLinear, three MatMulInteger


class Block(torch.nn.Module):
    """One attention block of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("q", "k", "v", "o")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            self.projections[name](x).reshape(x.shape[0], x.shape[1], 4, 16).transpose(1, 2) for name in ("q", "k", "v")
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: torch.Tensor = x + self.projections["o"](mixed.transpose(1, 2).reshape(x.shape))
        return result


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch.onnx.export needs onnxscript")
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_torch_exports_is_taken(tmp_path: Path, dynamic: bool) -> None:
    """Causal attention over as many keys as queries is sound: only float32 is noted, and sizes that are fixed."""
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")} if dynamic else None
    torch.onnx.export(
        Block().eval(),
        (torch.randn(2, 8, 64),),
        str(tmp_path / "model.onnx"),
        dynamo=True,
        opset_version=23,
        dynamic_shapes=(sizes,) if sizes else None,
    )
    found = by_rule(lint_model(tmp_path / "model.onnx").findings)
    assert set(found) == {"attention-float32"} | (set() if dynamic else {"fixed-shape"})
