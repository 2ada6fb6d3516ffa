"""The builder refuses what would make no graph, shares what is alike, and streams weights block by block."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from spike_export.artifacts.errors import ArtifactError, CheckpointError
from spike_export.calibration.decoder.weight_quantization import quantize_weight
from spike_export.checkpoint.row_blocks import PANEL_ROWS
from spike_export.export.files.weight_file import file_bytes, write_weights
from spike_export.export.graph.graph_builder import GraphBuilder, element_type
from spike_export.export.graph.linear import QuantizedWeight
from tests.support.tiny.models import MemoryTensors, tiny_llama

FLOAT, FLOAT16, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64


def test_a_name_is_given_once_and_joins_no_others() -> None:
    b = GraphBuilder()
    x = b.input("x", FLOAT, ["n"])
    b.op("Abs", [x], "m")
    b.op("Abs", [x], "m", label="second")
    for module, label in (("m", None), ("m", "second"), ("m", "a+b"), ("m+n", None)):
        with pytest.raises(ValueError, match="is taken or not allowed"):
            b.op("Abs", [x], module, label=label)
    b.initializer("w", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="initializer name 'w' is taken"):
        b.initializer("w", np.ones(2, np.float32))


def test_a_node_has_its_first_inputs_type_unless_it_says_another() -> None:
    b = GraphBuilder()
    x, ids = b.input("x", FLOAT16, ["n"]), b.input("ids", INT64, ["n"])
    assert [value.dtype for value in (b.op("Gather", [x, ids], "m"), b.op("Shape", [x], "m", dtype=INT64))] == [
        FLOAT16,
        INT64,
    ]
    with pytest.raises(ValueError, match="value 'y' has no element type"):
        element_type(ir.Value(name="y"))


def test_one_cast_serves_all_readers_and_keeps_its_sources_metadata() -> None:
    b = GraphBuilder()
    x = b.input("x", FLOAT, ["n"])
    y = b.op("Abs", [x], "m", metadata={"precision": "int8"})
    assert b.cast(y, FLOAT) is y
    half = b.cast(y, FLOAT16)
    assert b.cast(y, FLOAT16) is half
    assert b.cast(half, FLOAT) is not y
    node = half.producer()
    assert node is not None
    assert (node.name, node.op_type, node.attributes["to"].value) == ("m.Abs_to_float16", "Cast", FLOAT16.value)
    assert dict(node.metadata_props) == {"module": "m", "precision": "int8"}
    with pytest.raises(ValueError, match="graph input 'x' is not cast"):
        b.cast(x, FLOAT16)


def test_equal_constants_are_one() -> None:
    b = GraphBuilder()
    assert b.integers(1, -2) is b.integers(1, -2)
    assert b.float32(0.5) is b.float32(0.5)
    values = (b.integers(1, -2), b.integers(3), b.integer(3), b.float32(0.5), b.number(0.5, np.dtype(np.float16)))
    arrays = [value.const_value.numpy() for value in values if value.const_value is not None]
    assert [(array.dtype.name, array.tolist()) for array in arrays] == [
        ("int64", [1, -2]),
        ("int64", [3]),
        ("int64", 3),
        ("float32", 0.5),
        ("float16", 0.5),
    ]


@pytest.mark.parametrize("transposed", [True, False])
def test_columns_are_multiplied_in_every_block(transposed: bool) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(2 * PANEL_ROWS + 7, 5)).astype(np.float32)
    factors = np.array([1, 2, 0.5, 3, 0.1], np.float32)
    checkpoint = replace(tiny_llama().checkpoint, tensors=MemoryTensors({"m.weight": weight}))
    source = QuantizedWeight(checkpoint, "m", "int8-per-channel", "int8", transposed, factors)
    scale = source.scale()
    out = np.empty(weight.shape[::-1] if transposed else weight.shape, np.int8)
    source.fill(out)
    expected, steps = quantize_weight(weight * factors, "int8-per-channel")
    np.testing.assert_array_equal(out if transposed else out.T, expected)
    np.testing.assert_array_equal(scale, steps)
    weight[PANEL_ROWS, 2] = np.nan
    with pytest.raises(CheckpointError, match=r"^tensor m\.weight: .*; the checkpoint is damaged, download it again$"):
        source.fill(out)


@pytest.mark.parametrize("place", [None, 0, 65_536, 99_999])
def test_a_value_that_is_not_finite_is_found_in_every_block(tmp_path: Path, place: int | None) -> None:
    values, builder = np.zeros(100_000, np.float32), GraphBuilder()
    builder.lazy("w", FLOAT, values.shape, lambda: values)
    if place is not None:
        values[place] = np.inf
    refused = nullcontext() if place is None else pytest.raises(ArtifactError, match=r"^w: holds NaN or infinity in fl")
    with refused:
        write_weights(builder.model("weights", "test", "0"), tmp_path / "data", 1, lambda *_: None)


def test_tensors_of_256_bytes_stay_in_the_graph(tmp_path: Path) -> None:
    builder = GraphBuilder()
    for size in (256, 257):
        builder.lazy(f"w{size}", ir.DataType.INT8, [size], lambda size=size: np.ones(size, np.int8))
    model = builder.model("weights", "test", "0")
    assert file_bytes(model) == 257
    write_weights(model, tmp_path / "data", 1, lambda *_: None)
    kept = {name: type(value.const_value) for name, value in model.graph.initializers.items()}
    assert kept == {"w256": ir.Tensor, "w257": ir.ExternalTensor}
    assert (tmp_path / "data").stat().st_size == 257
