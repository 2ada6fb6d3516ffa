"""Every rule finds a planted fault where it is, and finds nothing in the sound graph beside it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spike_export.engines.lint.finding import SEVERITIES, Finding
from spike_export.engines.lint.linter import RULES, lint_model
from tests.support.lint_cases import CASES, SOUND, cache, float8, quantized, rotary, unary
from tests.support.lint_graphs import FLOAT, attention, graph, node, save, scatter, siblings, stored, value


def found(model: onnx.ModelProto, folder: Path) -> list[Finding]:
    return list(lint_model(save(model, folder)).findings)


IN_FILES = {"model-too-large", "data-missing", "data-short", "data-misaligned", "data-outside"}
"""Rules that tests/engines/lint/test_files.py plants faults for."""


@pytest.mark.parametrize("name", CASES)
def test_a_planted_fault_is_found_where_it_is(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    places = [finding.node for finding in found(case.planted, tmp_path) if finding.rule == case.rule]
    assert case.place in places


@pytest.mark.parametrize("name", CASES)
def test_the_sound_graph_beside_it_is_not_accused(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    assert case.rule not in {finding.rule for finding in found(case.sound, tmp_path)}


def test_every_rule_has_a_planted_fault() -> None:
    assert {case.rule for case in CASES.values()} | IN_FILES == {rule.id for rule in RULES}
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert {rule.severity for rule in RULES} == set(SEVERITIES)


@pytest.mark.parametrize(
    "model", [SOUND.model(), float8().model(), siblings(), attention(), scatter(), rotary(), cache()]
)
def test_the_shipped_patterns_are_clean(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert found(model, tmp_path) == []


def test_a_finding_names_node_operator_module_and_remedy(tmp_path: Path) -> None:
    model = SOUND.but(axis=0).model()
    product = model.graph.node[-1]
    product.metadata_props.add(key="module", value="model.layers.0.mlp.up_proj")
    (finding,) = found(model, tmp_path)
    assert (finding.rule, finding.severity, finding.node, finding.op, finding.module, finding.scope) == (
        "weight-scale-per-input",
        "error",
        "y.MatMul",
        "MatMul",
        "model.layers.0.mlp.up_proj",
        "",
    )
    assert "scale per input channel" in finding.reason
    assert "per output channel" in finding.remedy


def test_a_weight_is_followed_through_transposes(tmp_path: Path) -> None:
    """[out, in] with a scale a row is right behind a Transpose, and a scale a column is wrong there."""
    for axis, wrong in ((0, False), (1, True)):
        model = SOUND.but(axis=axis).model()
        model.graph.node[-1].input[1] = "turned"
        model.graph.node.insert(len(model.graph.node) - 1, node("Transpose", ["w"], ["turned"], perm=[1, 0]))
        rules = {finding.rule for finding in found(model, tmp_path)}
        assert ("weight-scale-per-input" in rules) is wrong


def conditional(planted: bool) -> onnx.ModelProto:
    """A quantizer inside a branch of If, its scale stored outside."""
    inner = helper.make_graph(quantized("x"), "then", [], [value("q_restored", FLOAT, None)])
    other = helper.make_graph([node("Identity", ["x"], ["same"])], "else", [], [value("same", FLOAT, None)])
    chosen = node("If", ["flag"], ["y"], then_branch=inner, else_branch=other)
    inputs = [value("flag", TensorProto.BOOL, []), value("x", FLOAT, ["b", 8])]
    tensors = [stored("s", 0.1, np.float32), stored("z", 3 if planted else 0, np.int8)]
    return graph([chosen], inputs, [value("y", FLOAT, None)], tensors)


def test_branches_are_looked_into(tmp_path: Path) -> None:
    assert found(conditional(planted=False), tmp_path) == []
    findings = found(conditional(planted=True), tmp_path)
    assert {(f.rule, f.scope) for f in findings} == {("zero-point-not-zero", "y.If/then_branch")}
    assert [f.op for f in findings] == ["QuantizeLinear", "DequantizeLinear"]


def called(body: list[onnx.NodeProto], domain: str = "local") -> onnx.ModelProto:
    model = unary("Round8", domain)
    function = helper.make_function(domain, "Round8", ["x"], ["q_restored"], body, [helper.make_opsetid("", 24)])
    model.functions.append(function)
    return model


def test_functions_are_looked_into_and_known(tmp_path: Path) -> None:
    constants = [
        node("Constant", [], ["s"], value=stored("s", -1, np.float32)),
        node("Constant", [], ["z"], value_int=0),
    ]
    findings = found(called([*constants, *quantized("x")]), tmp_path)
    assert {finding.rule for finding in findings} >= {"scale-not-positive"}
    assert {finding.scope for finding in findings} == {"function local.Round8"}
    assert found(called([node("Relu", ["x"], ["q_restored"])], "trt"), tmp_path) == []


def test_a_function_parameter_may_be_anything(tmp_path: Path) -> None:
    model = unary("Round8", "local")
    function = helper.make_function(
        "local", "Round8", ["x", "s", "z"], ["q_restored"], quantized("x"), [helper.make_opsetid("", 24)]
    )
    model.functions.append(function)
    assert found(model, tmp_path) == []


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 23])
def test_old_opsets_are_linted_too(tmp_path: Path, opset: int) -> None:
    model = SOUND.but(axis=0, scale=0.0).model()
    model.opset_import[0].version = opset
    model.ir_version = 8
    rules = {finding.rule for finding in found(model, tmp_path)}
    assert {"scale-not-positive", "weight-scale-per-input"} <= rules


def test_the_document_lists_every_rule() -> None:
    text = (Path(__file__).parents[3] / "docs" / "decisions" / "lint.md").read_text(encoding="utf-8")
    rows = [f"| `{rule.id}` | {rule.severity} | {rule.title} |" for rule in RULES]
    assert [line for line in text.partition("## Rules")[2].splitlines() if line.startswith("| `")] == rows
