"""The data file: the bytes onnx-ir would write, each weight quantized once, and errors that leave no thread behind."""

import errno
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from benchmarks.large.invented_recipe import invented_recipe
from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.recipe import Dtype
from spike_export.calibration.decoder import weight_quantization
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.export.decoder.decoder_graph import build_decoder
from spike_export.export.files.weight_file import file_bytes, write_weights
from spike_export.export.graph import linear
from spike_export.export.graph.graph_builder import GraphBuilder
from spike_export.export.graph_plan import GraphPlan
from tests.support.tiny.families import replaced
from tests.support.tiny.models import tiny_llama, unquantized_recipe

DATA = "model.onnx.data"


def decoder(checkpoint: Checkpoint) -> ir.Model:
    return build_decoder(checkpoint, GraphPlan(invented_recipe(checkpoint).modules, "int8-per-channel", "float16"))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_files_are_those_of_onnx_ir(tmp_path: Path, threads: int) -> None:
    checkpoint = tiny_llama().checkpoint
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    ir.save(decoder(checkpoint), theirs / "model.onnx", external_data=DATA, alignment=4096, align_threshold=0)
    model, told = decoder(checkpoint), []
    assert file_bytes(model) == (theirs / DATA).stat().st_size
    write_weights(model, ours / DATA, threads, lambda done, total: told.append((done, total)))
    ir.save(model, ours / "model.onnx")
    for name in ("model.onnx", DATA):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    held = onnx.load(ours / "model.onnx", load_external_data=False).graph.initializer
    count = sum(bool(tensor.external_data) for tensor in held)
    assert told == [(done, count) for done in range(1, count + 1)]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_weight_is_quantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    checkpoint = tiny_llama().checkpoint
    count: Counter[tuple[int, ...]] = Counter()

    def counted(out: np.ndarray, *arguments: object, **options: object) -> np.ndarray:
        count[out.shape] += 1
        return weight_quantization.quantize_rows(out, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "quantize_rows", counted)
    monkeypatch.setattr("spike_export.export.files.weight_file._INLINE_BYTES", 16)
    model = decoder(checkpoint)
    write_weights(model, tmp_path / DATA, threads, lambda *_: None)
    ir.save(model, tmp_path / "model.onnx")
    assert count.total() == len(invented_recipe(checkpoint).modules)
    model = ir.load(tmp_path / "model.onnx")
    name = "model.layers.0.mlp.up_proj.weight"
    quantized, scale = weight_quantization.quantize_weight(checkpoint.tensor(name), "int8-per-channel")
    found = {key: value.const_value for key, value in model.graph.initializers.items()}
    np.testing.assert_array_equal(found[name].numpy(), quantized)  # type: ignore[union-attr]
    np.testing.assert_array_equal(found[f"{name}_scale"].numpy(), scale)  # type: ignore[union-attr]


def test_small_tensors_come_last_though_not_in_the_file(tmp_path: Path) -> None:
    builder, made = GraphBuilder(), []

    def read(name: str, size: int) -> np.ndarray:
        made.append(name)
        return np.full(size, len(name), np.int8)

    sizes = {"scale": 5000, "weight": 2 << 20, "scales": 5000, "weights": 2 << 20}
    for name, size in sizes.items():
        builder.lazy(name, ir.DataType.INT8, [size], lambda name=name, size=size: read(name, size))
    write_weights(builder.model("weights", "test", "0"), tmp_path / DATA, 1, lambda *_: None)
    assert made == ["weight", "weights", "scale", "scales"]
    content = np.fromfile(tmp_path / DATA, np.int8)
    assert [content[offset] for offset in (0, 8192, 8192 + (2 << 20), 16384 + (2 << 20))] == [5, 6, 6, 7]


def streamed(count: int, failing: int) -> ir.Model:
    builder = GraphBuilder()

    def fill(index: int, out: np.ndarray) -> None:
        if index == failing:
            raise ValueError(f"tensor {index} is damaged")
        out[...] = index

    for index in range(count):
        builder.streamed(f"t{index}", ir.DataType.FLOAT, [1024], lambda out, index=index: fill(index, out))
    return builder.model("weights", "test", "0")


def test_a_tensor_that_cannot_be_made_ends_it(tmp_path: Path) -> None:
    before, told = threading.active_count(), []
    with pytest.raises(ValueError, match=r"^tensor 3 is damaged$"):
        write_weights(streamed(400, failing=3), tmp_path / DATA, 2, lambda done, _: told.append(done))
    assert len(told) < 399
    assert threading.active_count() == before


def test_a_listener_that_raises_ends_it(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write_weights(streamed(400, failing=-1), tmp_path / DATA, 2, stop)
    assert threading.active_count() == before


def test_what_the_disk_takes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: pwrite(file, content[:1000], offset))
    write_weights(streamed(5, failing=-1), tmp_path / DATA, 2, lambda *_: None)
    found = np.fromfile(tmp_path / DATA, np.float32)
    np.testing.assert_array_equal(found, np.repeat(np.arange(5), 1024))


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space") as raised:
        write_weights(streamed(5, failing=-1), tmp_path / DATA, 2, lambda *_: None)
    assert raised.value.errno == errno.ENOSPC


def test_a_tensor_of_another_size_than_declared_is_not_written(tmp_path: Path) -> None:
    builder = GraphBuilder()
    builder.lazy("t", ir.DataType.FLOAT, [1024], lambda: np.zeros(1000, np.float32))
    with pytest.raises(ValueError, match=r"^tensor 't' has 4000 bytes, declared are 4096$"):
        write_weights(builder.model("weights", "test", "0"), tmp_path / DATA, 1, lambda *_: None)


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.weight", np.nan, "float32"),
        ("model.layers.1.self_attn.q_proj.weight", np.inf, "bfloat16"),
        ("lm_head.weight", 1e5, "float16"),  # beyond 65,504
        ("model.norm.weight", np.nan, "float32"),  # small enough for the graph's own file
        ("model.layers.0.self_attn.q_proj.bias", 1e5, "float16"),  # likewise
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, name: str, value: float, dtype: Dtype) -> None:
    checkpoint = tiny_llama(biases=True).checkpoint
    weight = checkpoint.tensor(name).copy()
    weight.flat[3] = value
    damaged = replaced(checkpoint, {name: weight})
    model = build_decoder(
        damaged, GraphPlan(unquantized_recipe(damaged, dtype=dtype).modules, "int8-per-channel", dtype)
    )
    with pytest.raises(ArtifactError, match=f"{name}: holds NaN or infinity in {dtype}"):
        write_weights(model, tmp_path / DATA, 2, lambda *_: None)
