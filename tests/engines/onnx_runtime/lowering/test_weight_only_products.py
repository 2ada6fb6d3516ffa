"""Products of weights alone: what they compute, where they are used, and that they continue the same cache."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime import session as sessions
from spike_export.engines.onnx_runtime.generation_graph import generation_graph
from spike_export.engines.onnx_runtime.lowering.given_weights import Values
from spike_export.engines.onnx_runtime.lowering.weight_only_products import OPERATOR, blocks, weigh_only
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession, WeightsCopy, open_for_generation
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.families import tiny_family
from tests.support.tiny.models import input_scales, tiny_recipe, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before")

INPUTS, OUTPUTS, STEP = 150, 24, np.float32(0.02)

TOKENS = np.random.default_rng(0).integers(3, 99, (2, 12))


@pytest.fixture(autouse=True)
def with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every processor hold the copy."""
    monkeypatch.setattr(sessions, "products_saturate", lambda: False)


def product(weights: NDArray[np.int8], scales: NDArray[np.float32], *, axis: int = 1) -> onnx.ModelProto:
    """Return a model that multiplies [1, 2, INPUTS] in INT8."""
    constants = {
        "step": STEP,
        "zero": np.int8(0),
        "weight": weights,
        "scale": scales,
        "weight_zero": np.zeros(scales.shape, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "weight_zero"], ["w"], axis=axis),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="product"),
    ]
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, size])
        for name, size in (("x", INPUTS), ("y", OUTPUTS))
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, made: dict[str, NDArray[np.generic]], x: NDArray[np.float32]) -> NDArray[np.float32]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_external_initializers(list(made), [ort.OrtValue.ortvalue_from_numpy(each) for each in made.values()])
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


READ: Values = numpy_helper.to_array


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("level", [0, 4])
def test_a_product_is_that_of_the_weights(block: int, level: int) -> None:
    """But for float32 sums at level 0, and at level 4 for half a step of each block's input."""
    random = np.random.default_rng(1)
    weights = random.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
    scales = random.uniform(0.01, 0.1, OUTPUTS).astype(np.float32)
    x = (random.standard_normal((1, 2, INPUTS)) * 9).astype(np.float32)  # far beyond what `STEP` holds
    model = product(weights, scales)
    made = weigh_only(model, READ, block, level)
    assert [node.op_type for node in model.graph.node] == [OPERATOR]
    exact = x.astype(np.float64) @ (weights.astype(np.float64) * scales)
    sums = np.abs(x).astype(np.float64) @ (np.abs(weights).astype(np.float64) * scales)
    tolerance = sums * INPUTS * np.finfo(np.float32).eps
    if level:
        for start in range(0, INPUTS, block):
            part = slice(start, start + block)
            half_step = np.abs(x[..., part]).max(axis=-1, keepdims=True) / 127 / 2
            tolerance = tolerance + half_step * (np.abs(weights[part].astype(np.float64)).sum(axis=0) * scales)
    error = np.abs(run(model, made, x) - exact)
    assert (error <= tolerance).all()
    assert level == 0 or error.max() > 1e-3  # rounded


def test_blocks_hold_the_weights() -> None:
    weights = np.random.default_rng(2).integers(-128, 128, (INPUTS, OUTPUTS)).astype(np.int8)
    found = blocks(weights, 64)
    assert found.shape == (OUTPUTS, 3, 64)
    restored = found.reshape(OUTPUTS, -1).astype(np.int16).T - 128
    np.testing.assert_array_equal(restored[:INPUTS], weights)
    assert not restored[INPUTS:].any()


def test_a_scale_for_each_input_is_left() -> None:
    model = product(np.ones((OUTPUTS, OUTPUTS), np.int8), np.ones(OUTPUTS, np.float32), axis=0)
    assert weigh_only(model, READ) == {}
    assert OPERATOR not in {node.op_type for node in model.graph.node}


def exported(folder: Path, *, int8: bool = True, static: bool = True) -> Path:
    model = tiny_family("llama", hidden_size=64, head_dim=16)
    recipe = unquantized_recipe(model.checkpoint, (5, 1))
    if int8:
        recipe = tiny_recipe(model.checkpoint, input_scales(model, TOKENS), prefix=(5, 1))
    cache = CacheOptions("static", 40) if static else CacheOptions("dynamic")
    export_bundle(model.checkpoint, recipe, ExportOptions("float32", cache=cache, logits="last"), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("copy") / "bundle")


def opened(bundle: Path, weights_copy: WeightsCopy) -> BundleSession:
    return open_for_generation(bundle, 1, weights_copy=weights_copy)


def begun(bundle: Path, rows: int, weights_copy: WeightsCopy) -> StaticSequences:
    batch = opened(bundle, weights_copy).begin(rows)
    assert isinstance(batch, StaticSequences)
    return batch


def test_every_int8_product_of_the_graph_is_replaced(bundle: Path) -> None:
    graph = generation_graph(bundle, load_manifest(bundle), weight_only=True)
    counted = Counter(node.op_type for node in onnx.load_from_string(graph.serialized).graph.node)
    assert counted[OPERATOR] == 4 * 4  # of each layer: query, key and value; output; gate and up; down
    assert counted["QuantizeLinear"] == 0


def test_a_step_of_one_row_computes_with_the_copy_and_any_other_does_not(bundle: Path) -> None:
    for rows in (1, 2):
        logits = []
        for weights_copy in ("never", "auto"):
            batch = begun(bundle, rows, weights_copy)
            first = [batch.admit(row, TOKENS[row]) for row in range(rows)]
            logits.append([*first, batch.step(TOKENS[:rows, :1])])
        same = [np.array_equal(one, other) for one, other in zip(*logits, strict=True)]
        assert same == [True] * rows + [rows == 2]


def test_the_copy_continues_a_sequence_as_weights_alone_would(bundle: Path) -> None:
    """Steps of one token and of several take turns over one cache, and are compared with unquantized products."""
    plain = exported(bundle.parent / "plain", int8=False)
    logits = {}
    for name, folder, weights_copy in (("copy", bundle, "auto"), ("int8", bundle, "never"), ("plain", plain, "never")):
        batch = begun(folder, 1, weights_copy)  # type: ignore[arg-type]
        parts = [batch.admit(0, TOKENS[0, :6]), batch.step(TOKENS[:1, :1]), batch.extend(0, TOKENS[1, :3])]
        parts += [batch.step(TOKENS[1:, place : place + 1]) for place in range(4)]
        logits[name] = np.concatenate(parts)[3:]
    copy, int8 = (np.abs(logits[name] - logits["plain"]).mean() for name in ("copy", "int8"))
    assert 0 < copy < int8


def test_one_copy_is_shared(bundle: Path) -> None:
    first, second = opened(bundle, "auto"), opened(bundle, "auto")
    assert first.single_row is not None
    assert first.single_row is second.single_row
    assert first.session is opened(bundle, "never").session


@pytest.mark.parametrize("why", ["never", "float32", "growing", "counting", "no lowering", "no VNNI"])
def test_no_copy_is_held(why: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle
    if why in ("float32", "growing"):
        folder = exported(tmp_path / "bundle", int8=why != "float32", static=why != "growing")
    if why == "no VNNI":
        monkeypatch.setattr(sessions, "products_saturate", lambda: True)
    opened = open_for_generation(
        folder,
        1,
        lowering=why != "no lowering",
        sample_clipping=0.5 if why == "counting" else 0.0,
        weights_copy="never" if why == "never" else "auto",
    )
    assert opened.single_row is None
