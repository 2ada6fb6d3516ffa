"""Models of any size and from anywhere: weights beside the file, inside it, or missing."""

import os
import resource
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from spike_export.artifacts.errors import ArtifactError
from spike_export.engines.lint.linter import lint_model
from spike_export.engines.lint.reading import read_model
from tests.support.lint_cases import SOUND
from tests.support.lint_graphs import FLOAT, Linear, graph, ints, node, save, stored, value

DATA = "weights.bin"


def rules(path: Path) -> list[str]:
    return [finding.rule for finding in lint_model(path).findings]


def external(folder: Path, linear: Linear = SOUND, *, threshold: int = 0) -> Path:
    """Write a model whose tensors of at least `threshold` bytes are in a file beside it."""
    onnx.save_model(
        linear.model(),
        folder / "model.onnx",
        save_as_external_data=True,
        location=DATA,
        size_threshold=threshold,
    )
    return folder / "model.onnx"


def test_scales_are_read_from_the_data_file_at_their_place(tmp_path: Path) -> None:
    scales = np.full(64, 0.01, np.float32)
    assert rules(external(tmp_path, SOUND.but(weight_scale=scales))) == []
    scales[40] = -1
    assert rules(external(tmp_path, SOUND.but(weight_scale=scales))) == ["scale-not-positive"]


def test_shapes_in_the_data_file_serve_inference(tmp_path: Path) -> None:
    """A weight that is transposed by way of Unsqueeze, whose axes are stored outside."""
    model = SOUND.but(axis=0).model()
    product = model.graph.node.pop()
    model.graph.initializer.append(stored("axes", [0], np.int64))
    model.graph.node.append(node("Unsqueeze", ["w", "axes"], ["stacked"]))
    product.input[1] = "stacked"
    model.graph.node.append(product)
    onnx.save_model(model, tmp_path / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=0)
    assert rules(tmp_path / "model.onnx") == ["weight-scale-per-input"]


def test_a_missing_data_file_is_said_and_the_rest_is_linted(tmp_path: Path) -> None:
    path = external(tmp_path, SOUND.but(axis=0), threshold=256)
    (tmp_path / DATA).unlink()
    findings = lint_model(path).findings
    assert [(f.rule, f.node) for f in findings] == [("weight-scale-per-input", "y.MatMul"), ("data-missing", DATA)]
    assert "2 tensors" in findings[1].reason


def test_a_short_data_file_is_said(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.truncate(tmp_path / DATA, 2000)
    findings = [f for f in lint_model(path).findings if f.rule == "data-short"]
    assert {f.node for f in findings} >= {"weight"}
    assert "which has 2000" in findings[0].reason


@pytest.mark.parametrize(("offset", "wrong"), [(0, False), (4096, False), (4100, True), (64, True)])
def test_large_tensors_begin_at_pages(tmp_path: Path, offset: int, wrong: bool) -> None:
    path = external(tmp_path, SOUND.but(weight=ints(1024, 1024)), threshold=256)
    model = onnx.load(path, load_external_data=False)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    next(entry for entry in weight.external_data if entry.key == "offset").value = str(offset)
    with (tmp_path / DATA).open("ab") as file:
        file.write(bytes(8192))
    assert rules(save(model, tmp_path)) == (["data-misaligned"] if wrong else [])


@pytest.mark.parametrize("location", ["../weights.bin", "/nowhere/weights.bin", "a/../../weights.bin"])
def test_data_outside_the_folder_are_said(tmp_path: Path, location: str) -> None:
    model = onnx.load(external(tmp_path), load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    assert "data-outside" in rules(save(model, tmp_path))


def test_an_unreadable_place_is_an_error(tmp_path: Path) -> None:
    model = onnx.load(external(tmp_path), load_external_data=False)
    model.graph.initializer[0].external_data[1].value = "many"
    with pytest.raises(ArtifactError, match="no readable place"):
        lint_model(save(model, tmp_path))


def sparse_model(path: Path, size: int) -> Path:
    """Write a model with one inline weight of `size` bytes, a hole in the file, and a fault behind it."""
    model = SOUND.but(axis=0).model()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    huge = TensorProto(name="huge", data_type=TensorProto.INT8, dims=[size >> 10, 1 << 10])
    head, tail = onnx.ModelProto(), onnx.ModelProto()
    head.CopyFrom(model)
    head.ClearField("graph")
    tail.graph.CopyFrom(model.graph)

    def length_delimited(number: int, length: int) -> bytes:
        encoded, values = b"", [number << 3 | 2, length]
        for rest in values:
            while rest > 0x7F:
                encoded, rest = encoded + bytes([rest & 0x7F | 0x80]), rest >> 7
            encoded += bytes([rest])
        return encoded

    raw = length_delimited(9, size)
    tensor = huge.SerializeToString() + raw
    field = length_delimited(5, len(tensor) + size)
    rest = tail.graph.SerializeToString()
    with path.open("wb") as file:
        file.write(head.SerializeToString())
        file.write(length_delimited(7, len(field) + len(tensor) + size + len(rest)) + field + tensor)
        file.seek(size, os.SEEK_CUR)
        file.write(rest)
    assert weight.name == "weight"
    return path


def test_a_model_beyond_protobufs_limit_is_linted_without_being_loaded(tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "model.onnx", 3 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert rules(path) == ["weight-scale-per-input", "model-too-large"]
    # Kilobytes: the structure, not the 3 GiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_external_weights_stay_in_their_file(tmp_path: Path) -> None:
    """The data file is a hole of 4 GiB; scales are read at their end of it."""
    path = external(tmp_path, threshold=100)
    model = onnx.load(path, load_external_data=False)
    size = 4 << 30
    entries = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = {entry.key: entry for entry in entries["weight"].external_data}
    entries["weight"].dims[:] = [1 << 16, 1 << 16]
    weight["length"].value, weight["offset"].value = str(size), "0"
    entries["weight_scale"].dims[:] = [1 << 16]
    scale = {entry.key: entry for entry in entries["weight_scale"].external_data}
    scale["offset"].value, scale["length"].value = str(size), str(4 << 16)
    os.truncate(tmp_path / DATA, size)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1 << 16
    with (tmp_path / DATA).open("ab") as file:
        file.write(np.r_[np.full((1 << 16) - 1, 0.01), np.inf].astype(np.float32).tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert rules(save(model, tmp_path)) == ["scale-not-positive"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_large_inline_constant_is_found_where_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    model = graph(
        [node("Add", ["x", "large"], ["y"])],
        [value("x", FLOAT, ["b", 1 << 16])],
        [value("y", FLOAT, None)],
        [stored("small", [1, 2], np.int64), stored("large", values)],
    )
    file = read_model(save(model, tmp_path))
    small, large = file.model.graph.initializer
    assert not large.raw_data
    assert np.array_equal(file.values(large), values)  # type: ignore[arg-type]
    assert file.values(small).tolist() == [1, 2]  # type: ignore[union-attr]


MODEL = SOUND.but(weight=ints(512, 512)).model().SerializeToString()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(end=st.integers(0, len(MODEL) - 1))
def test_a_truncated_file_is_one_clear_error(tmp_path: Path, end: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(MODEL[:end])
    with pytest.raises(ArtifactError, match=r"model\.onnx: not a"):
        lint_model(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 700), byte=st.integers(0, 255))
def test_a_damaged_file_is_linted_or_one_clear_error(tmp_path: Path, place: int, byte: int) -> None:
    small = SOUND.but(weight=ints(2, 2)).model().SerializeToString()
    damaged = bytearray(small)
    damaged[place % len(small)] = byte
    path = tmp_path / "model.onnx"
    path.write_bytes(damaged)
    with suppress(ArtifactError):  # anything else is a bug
        assert all(finding.remedy for finding in lint_model(path).findings)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_what_is_no_model_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx: not a"):
        lint_model(path)


def test_a_missing_file_or_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ArtifactError, match="no such file"):
            lint_model(path)
