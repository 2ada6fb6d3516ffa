"""The benchmarks of the export, on a tiny model; and that threads change no byte."""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks.large import export as large_export
from benchmarks.large.export import Use
from benchmarks.large.invented_recipe import invented_recipe
from benchmarks.large.model import Shape, Stored, write_model
from benchmarks.stages import export_cost
from benchmarks.stages.export_cost import Exporter, graph_size, installed
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import NumberFormat, WeightScheme
from spike_export.calibration.decoder.equivalent.equivalent_weights import equivalent_checkpoint
from spike_export.calibration.decoder.weight_quantization import ELEMENTS, quantize_rows, quantize_weight
from spike_export.checkpoint.checkpoint import EMBEDDING, Checkpoint
from spike_export.checkpoint.modules import input_sites
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.checkpoint.row_blocks import PANEL_ROWS, block_rows, fill_by_rows
from spike_export.export import bundle as bundle_module
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.graph.weight_layout import read_matrix
from tests.support.process_in_place import in_this_process
from tests.support.tiny.checkpoints import random_llama, write_hf
from tests.support.tiny.families import NAMES, tiny_family
from tests.support.tiny.models import tiny_llama

TINY = Shape(hidden=32, intermediate=PANEL_ROWS + 44, layers=2, heads=4, kv_heads=2, vocab=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, TINY, "float16", 0)
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("kind", ["int8", "smoothed behind a prefix", "float16"])
def test_threads_change_no_byte(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe = None if kind == "float16" else invented_recipe(checkpoint, prefix_and_smoothing=kind != "int8")
    written = []
    for threads in (1, 3):
        monkeypatch.setattr(bundle_module, "_threads", lambda _, threads=threads: threads)
        export_bundle(checkpoint, recipe, ExportOptions("float16"), tmp_path / "b")
        written.append({path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()})
    assert written[0] == written[1]


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_matrix_is_read_as_numpy_rounds_it(tmp_path: Path, stored: Stored, dtype: type, name: str) -> None:
    write_model(tmp_path, TINY, stored, 0)
    checkpoint = open_checkpoint(str(tmp_path))
    whole = checkpoint.tensor(name).astype(dtype)
    out, turned = np.empty(whole.shape, dtype), np.empty(whole.T.shape, dtype)
    read_matrix(checkpoint, name, out)
    read_matrix(checkpoint, name, turned, transposed=True)
    np.testing.assert_array_equal(out, whole)
    np.testing.assert_array_equal(turned, whole.T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rounding_to_16_bit_is_numpys(tmp_path: Path, dtype: type) -> None:
    """All magnitudes of float32, subnormal and too large ones of the target too; halfway cases among them."""
    bits = np.random.default_rng(0).integers(0, 2**32, 258 * 64, dtype=np.uint32)
    bits[::3] &= np.uint32(0xFFFF8000)
    values = bits.view(np.float32)
    values[~np.isfinite(values)] = 0.0
    model = random_llama(hidden_size=64, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(values.reshape(258, 64)))
    checkpoint = open_checkpoint(str(write_hf(tmp_path, model, dtype=torch.float32)))
    out = np.empty((258, 64), dtype)
    read_matrix(checkpoint, EMBEDDING, out)
    with np.errstate(over="ignore"):
        expected = values.reshape(258, 64).astype(dtype)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("shape", [(1, 1), (63, 513), (64, 512), (PANEL_ROWS + 1, 1025)], ids=str)
def test_a_transpose_in_blocks_is_the_transpose(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for transposed in (False, True):
        out = np.full(shape[::-1] if transposed else shape, np.nan, np.float16)
        fill_by_rows(out, lambda rows, place: np.copyto(place, matrix[rows], casting="unsafe"), transposed=transposed)
        np.testing.assert_array_equal(out, (matrix.T if transposed else matrix).astype(np.float16))


def test_blocks_follow_one_another_and_fit_the_cache() -> None:
    height, width, seen = PANEL_ROWS + 3, 9000, []
    out = np.empty((width, height), np.int8)
    fill_by_rows(out, lambda rows, place: seen.append((rows, place.shape)), transposed=True)
    assert [rows.start for rows, _ in seen] == [0, *(rows.stop for rows, _ in seen[:-1])]
    assert seen[-1][0].stop == height
    assert all(shape == (rows.stop - rows.start, width) for rows, shape in seen)
    assert max(shape[0] for _, shape in seen) == block_rows(width) == 14
    assert block_rows(10**9) == 1


@pytest.mark.parametrize("scheme", ["int8-per-channel", "int8-per-tensor"])
@pytest.mark.parametrize("number_format", ["int8", "fp8"])
def test_a_weight_that_is_not_transposed_is_the_same(scheme: WeightScheme, number_format: NumberFormat) -> None:
    weight = np.random.default_rng(0).normal(size=(PANEL_ROWS + 5, 1030)).astype(np.float32)
    turned, scale = quantize_weight(weight, scheme, number_format)
    out = np.empty(weight.shape, ELEMENTS[number_format])
    found = quantize_rows(
        out, lambda rows, place: np.copyto(place, weight[rows]), scheme, number_format, transposed=False
    )
    np.testing.assert_array_equal(out.view(np.int8), turned.T.view(np.int8))
    np.testing.assert_array_equal(found, scale)


def test_the_bundle_holds_the_quantized_weights(tmp_path: Path, checkpoint: Checkpoint) -> None:
    import onnx
    from onnx import numpy_helper

    export_bundle(checkpoint, invented_recipe(checkpoint), ExportOptions("float16"), tmp_path / "b")
    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    name = "model.layers.1.mlp.gate_proj.weight"
    quantized, scale = quantize_weight(checkpoint.tensor(name), "int8-per-channel")
    np.testing.assert_array_equal(numpy_helper.to_array(tensors[name]), quantized)
    np.testing.assert_array_equal(numpy_helper.to_array(tensors[f"{name}_scale"]), scale)


@pytest.mark.parametrize("options", [[], ["--prefix-and-smoothing"]], ids=["plain", "prefix-and-smoothing"])
def test_the_large_export_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.setattr(large_export, "Shape", lambda layers: TINY)
    if options:  # one of the two has processes of its own
        monkeypatch.setattr(large_export, "in_own_process", in_this_process)
    written = [f"--scratch={tmp_path}", f"--json={tmp_path / 'figures.json'}"]
    monkeypatch.setattr(sys, "argv", ["large_export", *written, *options])
    assert large_export.main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["quantize"], figures["prefix_and_smoothing"]) == (True, bool(options))
    (copy,), (export,) = figures["copies"], figures["exports"]
    assert copy["bytes_written"] >= TINY.stored_bytes()
    assert export["peak_rss"] >= export["start_rss"] > 10 << 20
    assert export["cpu_seconds"] > copy["cpu_seconds"] >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert "export over copy" in capsys.readouterr().out


def test_the_options_of_the_large_export_reach_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    write_model(folder, TINY, "float16", 0)
    for given, length in (((True, False), None), ((True, True), 1), ((False, False), None)):
        large_export._export(folder, tmp_path / "b", *given)
        manifest = load_manifest(tmp_path / "b")
        assert ("int8" in manifest.linears) == given[0]
        assert (None if manifest.prefix is None else manifest.prefix.length) == length
    monkeypatch.setattr(sys, "argv", ["large_export", "--no-quantize", "--prefix-and-smoothing"])
    with pytest.raises(SystemExit):
        large_export.main()


@pytest.mark.parametrize("name", NAMES)
def test_an_invented_smoothing_is_of_every_input_that_can_be_smoothed(name: str) -> None:
    original = tiny_family(name).checkpoint
    smoothing = invented_recipe(original, prefix_and_smoothing=True).smoothing
    smoothed = equivalent_checkpoint(original, None, smoothing)
    sites = [site for site in input_sites(original.config) if site.producer is not None]
    for weight in (f"model.layers.3.{reader}.weight" for site in sites for reader in site.readers):
        assert not np.array_equal(smoothed.tensor(weight), original.tensor(weight)), weight
    assert invented_recipe(original).smoothing == {}


def test_the_verdicts_are_of_rate_and_memory() -> None:
    copies = [Use(4.0, 1.0, 100, 0, 0), Use(2.0, 1.0, 100, 0, 0)]
    met = large_export.table(copies, [Use(4.0, 7.0, 50, 0, 2_500_000_000)], 100)
    assert "0.50 (aim 0.5) met" in met
    assert "2500 MB (aim 2500 MB) met" in met
    missed = large_export.table(copies, [Use(4.1, 7.0, 50, 0, 2_500_000_001)], 100)
    assert missed.count("missed") == 2


def test_an_exporter_that_is_not_there_is_left_out() -> None:
    assert installed(Exporter("python", (), (sys.executable, "-c", "pass")))
    assert not installed(Exporter("python", (), (sys.executable, "-c", "import no_such_module")))
    assert not installed(Exporter("nothing", (), ("no-such-program",)))


def test_all_exporters_read_the_same_model(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", random_llama(tie_word_embeddings=True), dtype=torch.float16)
    export_cost.write_model(source, tmp_path / "model")
    stored, written = (open_checkpoint(str(folder)) for folder in (source, tmp_path / "model"))
    assert written.tensors.shapes == stored.tensors.shapes
    for name in stored.tensors.shapes:
        np.testing.assert_array_equal(written.tensor(name), stored.tensor(name))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"
    assert written.generation_config["eos_token_id"] == 1
    assert written.tokenizer is not None
    assert written.tokenizer.get_vocab() == stored.tokenizer.get_vocab()  # type: ignore[union-attr]


def test_nodes_and_bytes_of_an_export(tmp_path: Path, checkpoint: Checkpoint) -> None:
    import onnx

    export_bundle(checkpoint, None, ExportOptions("float32"), tmp_path / "out" / "b")
    graph, data = (tmp_path / "out" / "b" / name for name in ("model.onnx", "model.onnx.data"))
    expected = len(onnx.load(graph, load_external_data=False).graph.node)
    assert graph_size(tmp_path / "out") == (expected, graph.stat().st_size + data.stat().st_size)
    cost = export_cost.Cost("ours", 1.0, 2.0, 3_000_000, expected, 4_000_000)
    assert f"{expected}         4.0" in export_cost.table([cost])


PYTHON_ONLY = (sys.executable, "-c", "pass")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_an_exporter_that_fails_or_takes_too_long_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = "import pathlib, shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2] + '/b')"
    compared = (
        Exporter("slow", (sys.executable, "-c", "import time; time.sleep(60)"), PYTHON_ONLY),
        Exporter("broken", (sys.executable, "-c", "raise SystemExit(3)"), PYTHON_ONLY),
        Exporter("whole", (sys.executable, "-c", copy, str(tmp_path / "bundle"), "{out}"), PYTHON_ONLY),
    )
    export_bundle(tiny_llama().checkpoint, None, ExportOptions("float32"), tmp_path / "bundle")
    monkeypatch.setattr(export_cost, "exporters", lambda *_: compared)
    monkeypatch.setattr(export_cost, "in_own_process", lambda work, *given: work(*given))
    monkeypatch.setattr(export_cost, "write_model", lambda source, folder: folder.mkdir())
    figures = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["export_cost", str(tmp_path), "--limit=3", f"--json={figures}"])
    assert export_cost.main() == 1
    slow, whole = json.loads(figures.read_text())
    assert (slow["exporter"], slow["nodes"]) == ("slow", None)
    assert 3 <= slow["seconds"] < 60
    assert whole["nodes"] > 10
    said = capsys.readouterr()
    assert "slow: started, at most 3 s" in said.err
    assert "export_cost: broken fails with exit code 3" in said.err
    assert [line.split()[0] for line in said.out.splitlines()[1:]] == ["slow", "whole"]
    assert "cut off, not done" in said.out
