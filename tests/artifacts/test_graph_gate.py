"""Graphs that cannot be followed are refused before anything follows them, and sound ones never."""

import re
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from spike_export.artifacts.graph_gate import graph_fault

VALUE = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
OUTPUT = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])


def model(*nodes: onnx.NodeProto, opset: int = 21) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "graph", [VALUE], [OUTPUT])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=f"the {op}", **attributes)


def branch(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [OUTPUT])


SOUND = branch(node("Identity", ["x"], ["y"]))


@pytest.mark.parametrize(
    ("nodes", "fault"),
    [
        ((node("Identity", ["y"], ["y"]),), "value 'y' depends on itself"),
        ((node("Transpose", ["b"], ["a"]), node("Transpose", ["a"], ["b"])), "value '[ab]' depends on itself"),
        ((node("Identity", ["x"], ["y"]), node("Transpose", ["y"], ["y"])), "value 'y' depends on itself"),
        ((node("MatMul", ["x"], ["y"]),), r"node 'the MatMul' \(MatMul\) has 1 of the 2 inputs that it needs"),
        ((node("MatMul", ["", "x"], ["y"]),), "has 1 of the 2 inputs"),
        ((node("DequantizeLinear", [], ["y"]),), "has 0 of the 2 inputs"),
        ((node("Cast", ["x"], ["y"]),), r"node 'the Cast' \(Cast\) lacks the attribute 'to'"),
        ((node("If", ["x"], ["y"]),), r"\(If\) lacks the attribute 'else_branch'"),
        ((node("Transpose", ["x"], []),), "has no output"),
        ((node("TopK", ["x", "x"], ["y"]),), "has 1 of its 2 outputs"),
        ((node("", ["x"], ["y"]),), "has no operator"),
        (
            (node("If", ["x"], ["y"], then_branch=branch(node("Cast", ["x"], ["y"])), else_branch=SOUND),),
            "lacks the attribute 'to'",
        ),
    ],
)
def test_a_faulty_graph_is_named(nodes: tuple[onnx.NodeProto, ...], fault: str) -> None:
    found = graph_fault(model(*nodes))
    assert found is not None
    assert re.search(fault, found), found


def test_a_faulty_function_is_found() -> None:
    faulty = model(node("Identity", ["x"], ["y"]))
    opset = [helper.make_opsetid("", 21)]
    faulty.functions.append(helper.make_function("own", "F", ["a"], ["b"], [node("Cast", ["a"], ["b"])], opset))
    assert graph_fault(faulty) == "node 'the Cast' (Cast) lacks the attribute 'to'"


@pytest.mark.parametrize(
    "place", ["node", "operator", "domain", "attribute", "tensor", "input", "branch", "operator set"]
)
def test_a_name_that_is_no_text_is_found(place: str) -> None:
    """protobuf refuses to write such a name, so that one byte of a stored message is changed."""
    names = {each: each for each in ("node", "operator", "domain", "attribute", "tensor", "input", "operator set")}
    names[place] = "PLANT"
    inner = branch(node("If", ["x"], ["y"], then_branch=SOUND, else_branch=SOUND))
    inner.initializer.append(
        helper.make_tensor("PLANT" if place == "branch" else "branch", TensorProto.FLOAT, [1], [0.0])
    )
    foreign = helper.make_node(
        names["operator"],
        [names["input"]],
        ["a"],
        name=names["node"],
        domain=names["domain"],
        **{names["attribute"]: 1},
    )
    planted = model(foreign, node("If", ["x"], ["y"], then_branch=inner, else_branch=SOUND))
    planted.graph.initializer.append(helper.make_tensor(names["tensor"], TensorProto.FLOAT, [1], [0.0]))
    planted.opset_import.append(helper.make_opsetid(names["operator set"], 1))
    stored = planted.SerializeToString()
    assert graph_fault(onnx.load_from_string(stored)) is None
    fault = graph_fault(onnx.load_from_string(stored.replace(b"PLANT", b"PL\xffNT")))
    assert fault is not None
    assert fault.endswith("is no text")


def test_foreign_and_unknown_operators_are_not_looked_into() -> None:
    foreign = helper.make_node("MatMul", [], ["a"], domain="com.example")
    assert graph_fault(model(foreign, node("NoSuchOperator", [], ["b"]), node("Identity", ["x"], ["y"]))) is None


def test_nodes_in_any_order_are_taken() -> None:
    assert graph_fault(model(node("Identity", ["a"], ["y"]), node("Identity", ["x"], ["a"]))) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_a_cycle_is_found_where_there_is_one(edges: list[tuple[int, int]]) -> None:
    made = {target: source for source, target in edges}
    nodes = [node("Identity", [f"v{source}"], [f"v{target}"]) for target, source in made.items()]

    def circles(start: int) -> bool:
        place, steps = made.get(start), 0
        while place is not None and place != start and steps < 20:
            place, steps = made.get(place), steps + 1
        return place == start

    assert (graph_fault(model(*nodes)) is not None) == any(map(circles, made))
