"""What the benchmarks of decoding compare computes what they say, over a small bundle."""

import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.speed import batches, lowering, weight_only_products
from benchmarks.speed.weight_only_products import blocks
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "denormals_as_before")

SMALL = ("--rounds", "1", "--steps", "2", "--threads", "1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = tiny_llama(), tmp_path_factory.mktemp("speed") / "bundle"
    scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 12)))
    options = ExportOptions("float32", logits="last", cache=CacheOptions("static", 40))
    export_bundle(model.checkpoint, tiny_recipe(model.checkpoint, scales), options, folder)
    return folder


@pytest.mark.parametrize("size", [16, 32])
def test_weights_in_blocks_are_the_same_weights(size: int) -> None:
    random = np.random.default_rng(0)
    weight, inputs = random.integers(-127, 128, (40, 6), np.int8), random.standard_normal((3, 40), np.float32)
    scales = random.random(6, np.float32)
    constants = {"blocks": blocks(weight, size), "scales": np.repeat(scales, -(-40 // size))}
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=40, N=6, bits=8, block_size=size
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 6])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = inputs.astype(np.float64) @ (weight * scales.astype(np.float64))
    # 40 float32 terms of at most 4 x 127.
    np.testing.assert_allclose(session.run(None, {"x": inputs})[0], expected, atol=40 * 40 * 4 * 127 * 2**-24)


def test_graphs_are_compared_by_their_steps(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lowering.main([str(bundle), "--rows", "1", "2", "--contexts", "5", *SMALL])
    assert len(re.findall(r"decode \d+\.\d\d x, \d+\.\d\d x", capsys.readouterr().out)) == 2
    weight_only_products.main([str(bundle), "--rows", "2", "--context", "5", "--blocks", "16", *SMALL])
    assert re.match(r"  2 rows \| INT8: .* ms, 1\.00 x \| blocks of 16: .* x\n$", capsys.readouterr().out)


def test_batches_of_several_bundles(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches.main([str(bundle), str(bundle), "--rows", "1", "3", "--context", "6", *SMALL])
    assert len(re.findall(r"^ +[13] \| bundle \| ", capsys.readouterr().out, re.MULTILINE)) == 4
    assert batches.lengths(3, 6) == [3, 6, 9]
