"""The benchmarks of the export, on a tiny model; and that threads change no byte."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import export_cost, large_export
from benchmarks.export_cost import Exporter, graph_size, installed
from benchmarks.invented_recipe import invented_recipe
from benchmarks.large_export import Use
from benchmarks.large_model import Shape, write_model
from spike_export.calibration.blocked_transpose import PANEL_ROWS, transposed_copy
from spike_export.calibration.checkpoint import Checkpoint, open_checkpoint
from spike_export.calibration.weight_quantization import quantize_weight
from spike_export.export import bundle as bundle_module
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.weight_layout import stored_tensor, transposed_tensor

TINY = Shape(hidden=32, intermediate=PANEL_ROWS + 44, layers=2, heads=4, kv_heads=2, vocab=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, TINY, "float16", 0)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("quantize", [True, False], ids=["int8", "float16"])
def test_threads_change_no_byte(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, quantize: bool
) -> None:
    recipe = invented_recipe(checkpoint) if quantize else None
    written = []
    for threads in (1, 3):
        monkeypatch.setattr(bundle_module, "_threads", lambda _, threads=threads: threads)
        export_bundle(checkpoint, recipe, ExportOptions("float16"), tmp_path / "b")
        written.append({path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()})
    assert written[0] == written[1]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_rows_are_those_of_the_whole_tensor(checkpoint: Checkpoint, name: str, dtype: type) -> None:
    whole = checkpoint.tensor(name).astype(dtype)
    stored = stored_tensor(checkpoint, name, np.dtype(dtype))
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, whole)
    turned = transposed_tensor(checkpoint, name, np.dtype(dtype))
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, whole.T)


def test_a_norm_is_read_too(checkpoint: Checkpoint) -> None:
    assert stored_tensor(checkpoint, "model.norm.weight", np.dtype(np.float16)).tolist() == [1.0] * TINY.hidden


@pytest.mark.parametrize("shape", [(1, 1), (63, 513), (64, 512), (PANEL_ROWS + 1, 1025)], ids=str)
def test_a_transpose_in_blocks_is_the_transpose(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(transposed_copy(matrix, np.float16), matrix.astype(np.float16).T)


def test_the_bundle_holds_the_quantized_weights(tmp_path: Path, checkpoint: Checkpoint) -> None:
    import onnx
    from onnx import numpy_helper

    export_bundle(checkpoint, invented_recipe(checkpoint), ExportOptions("float16"), tmp_path / "b")
    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    name = "model.layers.1.mlp.gate_proj.weight"
    quantized, scale = quantize_weight(checkpoint.tensor(name), "int8-per-channel")
    np.testing.assert_array_equal(numpy_helper.to_array(tensors[name]), quantized)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors[f"{name}_scale"]), scale)


def test_the_large_export_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(large_export, "Shape", lambda layers: TINY)
    options = [f"--scratch={tmp_path}", f"--json={tmp_path / 'figures.json'}"]
    monkeypatch.setattr(sys, "argv", ["large_export", *options])
    assert large_export.main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    (copy,), (export,) = figures["copies"], figures["exports"]
    assert copy["bytes_written"] >= TINY.stored_bytes()
    assert export["peak_rss"] >= export["start_rss"] > 10 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert "export over copy" in capsys.readouterr().out


def test_the_verdicts_are_of_rate_and_memory() -> None:
    copies = [Use(4.0, 100, 0, 0), Use(2.0, 100, 0, 0)]
    met = large_export.table(copies, [Use(4.0, 50, 0, 2_500_000_000)], 100)
    assert "0.50 (aim 0.5) met" in met
    assert "2500 MB (aim 2500 MB) met" in met
    missed = large_export.table(copies, [Use(4.1, 50, 0, 2_500_000_001)], 100)
    assert missed.count("missed") == 2


def test_an_exporter_that_is_not_there_is_left_out() -> None:
    assert installed(Exporter("python", (), (sys.executable, "-c", "pass")))
    assert not installed(Exporter("python", (), (sys.executable, "-c", "import no_such_module")))
    assert not installed(Exporter("nothing", (), ("no-such-program",)))


def test_nodes_and_bytes_of_an_export(tmp_path: Path, checkpoint: Checkpoint) -> None:
    import onnx

    export_bundle(checkpoint, None, ExportOptions("float32"), tmp_path / "out" / "b")
    graph, data = (tmp_path / "out" / "b" / name for name in ("model.onnx", "model.onnx.data"))
    expected = len(onnx.load(graph, load_external_data=False).graph.node)
    assert graph_size(tmp_path / "out") == (expected, graph.stat().st_size + data.stat().st_size)
    cost = export_cost.Cost("ours", 1.0, 2.0, 3_000_000, expected, 4_000_000)
    assert f"{expected}         4.0" in export_cost.table([cost])
