"""The GPU harness on a machine without one: its counts, its tables, and its run over a pretended GPU."""

import json
import re
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import engines as gpu_engines
from benchmarks.gpu import measurement as gpu
from benchmarks.gpu import torch_products as gpu_torch
from benchmarks.gpu.report import (
    MachineName,
    Parity,
    Report,
    Timed,
    TimedProduct,
    document,
    result_path,
    speed_up,
    text,
    write,
)
from benchmarks.gpu.work import VARIANTS, Bound, Call, Model, Peaks, bound, calls, work
from benchmarks.large.model import Shape
from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import load_manifest
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.engines.build import reuse as plan_reuse
from spike_export.engines.build.reuse import ProvidedEngine
from spike_export.engines.plan.backend import TENSORRT_RTX, Gpu, Machine
from spike_export.engines.tensorrt import decoding as trt_decoding
from tests.support.tiny.models import TinyModel, input_scales, tiny_llama, tiny_recipe
from tests.support.trt_simulation import simulate

FP16, W8A8, W8A16, FP8 = VARIANTS
HOPPER = Machine(frozenset({"tensorrt", "tensorrt-rtx"}), Gpu("NVIDIA H200", "SM90"))
MACHINE = MachineName("NVIDIA H200", "SM90", 141 * 10**9, "580.95", "x86_64", {"torch": "2.13.0"})

# A GPU of round figures.
PEAKS = Peaks(4e12, {"float16": 1e15, "int8": 2e15})

TINY = Model(linears=((6, 4), (2, 8)), layers=3, heads=4, kv_heads=2, head_dim=16, hidden=4, vocab=10)


def llama() -> Model:
    return Model.of(decoder_config(Shape().config("float16"), "llama"))


def test_the_weights_of_a_7b_model_are_counted() -> None:
    """LLaMA-2-7B has 6,738,415,616 parameters; without embedding and norms these are the layers' and the head's."""
    model = llama()
    norms, embedding = (2 * 32 + 1) * 4096, 32000 * 4096
    step = Call("decode", 1, 1, 0, 1)
    assert work(model, FP16, step).weights == 2 * (6_738_415_616 - norms - embedding)
    assert len(model.linears) == 32 * 7


def test_bytes_and_operations_by_hand() -> None:
    weights = 6 * 4 + 2 * 8
    call = Call("decode", batch=5, tokens=1, past=7, slots=16)
    slot = 2 * 3 * 2 * 16 * 2  # key and value, layers, heads, channels, bytes
    head = 4 * 10
    attention = 5 * 16 * 3 * 4 * 16 * 2 * 2  # rows, slots, layers, heads, channels; two products; multiply and add
    needed = work(TINY, FP16, call)
    assert needed.weights == 2 * weights + 2 * head
    assert needed.cache == 5 * (16 + 1) * slot
    assert needed.logits == 5 * 10 * 2
    assert needed.operations == {"float16": 5 * 2 * weights + 5 * 2 * head + attention}
    assert needed.moved == needed.weights + needed.cache + needed.logits
    quantized = work(TINY, W8A8, call)
    assert quantized.weights == weights + 4 * (6 + 2) + 2 * head
    assert quantized.operations == {"float16": 5 * 2 * head + attention, "int8": 5 * 2 * weights}
    assert work(TINY, W8A16, call).operations == needed.operations
    assert work(TINY, W8A16, call).weights == quantized.weights
    assert work(TINY, FP8, call).operations == {"float16": 5 * 2 * head + attention, "fp8": 5 * 2 * weights}
    # A prefill multiplies all tokens, and only the last one's logits.
    prefill = work(TINY, W8A8, Call("prefill", batch=5, tokens=8, past=0, slots=16))
    assert prefill.operations == {"float16": 5 * 2 * head + 8 * attention, "int8": 8 * 5 * 2 * weights}


def test_a_step_is_bound_by_memory_and_a_prefill_by_arithmetic() -> None:
    model = llama()
    step, prefill = calls([1], 2048, 2304)[::-1]
    (slow, fast) = (bound(work(model, variant, step), PEAKS) for variant in (FP16, W8A8))
    assert slow is not None
    assert fast is not None
    assert slow.by == fast.by == "memory"
    # Half of the weights, and all of cache and head.
    assert 1.6 < slow.seconds / fast.seconds < 2
    limit = bound(work(model, W8A8, prefill), PEAKS)
    assert limit is not None
    assert limit.by == "arithmetic"
    assert limit.seconds == limit.arithmetic > limit.memory
    assert bound(work(model, FP8, prefill), PEAKS) is None


def test_the_cases_are_a_prefill_and_a_step_per_batch() -> None:
    assert calls([1, 32], 512, 768) == (
        Call("prefill", 1, 512, 0, 768),
        Call("decode", 1, 1, 512, 768),
        Call("prefill", 32, 512, 0, 768),
        Call("decode", 32, 1, 512, 768),
    )
    assert gpu_engines.capacity_for(512, 51) == 768
    assert gpu_engines.capacity_for(256 - 3, 3) == 512  # three steps before the first that counts


def report() -> Report:
    call = Call("decode", 32, 1, 512, 768)
    timed = [
        Timed("tensorrt", variant.name, call, seconds, seconds, 3, work(TINY, variant, call), Bound(1e-3, 5e-4))
        for variant, seconds in ((FP16, 4e-3), (W8A8, 2e-3))
    ]
    other = Timed("onnxruntime-gpu", "FP8", call, 1e-3, 1e-3, 3, work(TINY, FP8, call), None)
    return Report(
        MACHINE,
        "tiny",
        PEAKS,
        [*timed, other],
        [TimedProduct("int8", 32, (6, 4), 1e-6)],
        [Parity("tensorrt", "FP16", 0.01, 1.0, 0.02), Parity("tensorrt", "W8A8", 0.2, 0.9, None)],
        {"TensorRT-RTX": "has no target SM90 (NVIDIA H200)"},
    )


def test_the_table_tells_rates_bounds_and_what_was_left_out() -> None:
    lines = text(report()).splitlines()
    assert lines[0] == "NVIDIA H200 (SM90, 141 GB), tiny"
    assert lines[1] == "seen at most: copy 4000 GB/s, float16 1000 TOP/s, int8 2000 TOP/s"
    fp16, w8a8, fp8 = lines[3:6]
    assert re.search(r"tensorrt +FP16 +decode, batch 32 +\| +4\.000 +4\.000 +8000 +1\.00x", fp16)
    assert re.search(r"tensorrt +W8A8 .* 2\.000 .* 16000 +2\.00x .* 1\.000 memory +50\.0%$", w8a8)
    assert re.search(r"onnxruntime-gpu +FP8 .* 1\.000 +1\.000 +32000 +\|", fp8)
    assert lines[6] == "torch int8         32 x 4 x 6:       1.0 us     0.0 TOP/s"
    assert "parity of FP16 in tensorrt: error 0.0100 (at most 0.02), same token 100.0%" in lines
    assert lines[-1] == "skipped: TensorRT-RTX: has no target SM90 (NVIDIA H200)"


def test_the_json_names_the_machine_and_holds_every_figure(tmp_path: Path) -> None:
    path = result_path(tmp_path / "results", "NVIDIA H200", date(2026, 11, 22))
    assert path.name == "nvidia-h200-2026-11-22.json"
    write(report(), path)
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(document(report())))
    assert read["machine"]["gpu"] == "NVIDIA H200"
    w8a8 = read["timed"][1]
    assert (w8a8["to_fp16"], w8a8["bound"]["by"], w8a8["bound"]["seconds"]) == (2.0, "memory", 1e-3)
    assert w8a8["work"]["moved"] == w8a8["work"]["weights"] + w8a8["work"]["cache"] + w8a8["work"]["logits"]
    assert read["timed"][2]["bound"] is None
    assert read["timed"][2]["to_fp16"] is None
    assert speed_up(report().timed, report().timed[1]) == 2.0


def test_a_missed_parity_is_told() -> None:
    missed = report()
    assert missed.passed
    missed.parity.append(Parity("tensorrt", "FP16", 0.03, 0.5, 0.02))
    assert not missed.passed
    assert "error 0.0300 (at most 0.02), same token 50.0% MISSED" in text(missed)


def test_logits_that_are_not_numbers_never_pass() -> None:
    expected = np.array([[[1.0, 4.0, -2.0], [3.0, 0.0, 1.0]]])
    same = gpu_engines.compare("tensorrt", "FP16", expected.astype(np.float32), expected)
    assert (same.error, same.agreement, same.passed) == (0.0, 1.0, True)
    off = gpu_engines.compare("tensorrt", "FP16", expected + np.array([0.0, -3.5, 0.0]), expected)
    assert (off.error, off.agreement, off.passed) == (3.5 / 4, 0.5, False)
    broken = gpu_engines.compare("tensorrt", "FP16", np.where(expected == 4, np.nan, expected), expected)
    assert (broken.error, broken.passed) == (float("inf"), False)
    assert not gpu_engines.compare("tensorrt", "W8A8", expected + 1, expected).tolerance


@pytest.mark.parametrize("variant", ["W8A8", "W8A16", "FP8"])
def test_quantized_plans_are_held_against_something(tmp_path: Path, variant: str) -> None:
    expected = np.array([[[1.0, 4.0, -2.0], [3.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    assert gpu_engines.compare("tensorrt", variant, expected, expected).passed
    other = gpu_engines.compare("tensorrt", variant, -expected, expected)
    assert not other.passed
    first_only = np.where(np.arange(3)[:, None] == 0, np.nan, expected)
    broken = gpu_engines.compare("tensorrt", variant, first_only, expected)
    assert not broken.passed
    measured = report()
    measured.parity = [broken]
    write(measured, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["parity"][0]["error"] is None
    assert "error inf" in text(measured)
    assert text(measured).count(" MISSED") == 1


def test_each_part_that_cannot_run_has_its_reason() -> None:
    assert gpu_engines.obstacle("tensorrt", HOPPER) is None
    assert gpu_engines.obstacle("tensorrt-rtx", HOPPER) == "has no target SM90 (NVIDIA H200)"
    bare = Machine(frozenset(), HOPPER.gpu)
    assert gpu_engines.obstacle("tensorrt-rtx", bare) == f"not installed; run: {TENSORRT_RTX.install}"
    kept, lacking = gpu_engines.wanted_variants(VARIANTS, "SM86")
    assert [variant.name for variant in kept] == ["FP16", "W8A8", "W8A16"]
    assert lacking == {"FP8": "SM86 does not multiply FP8"}
    assert gpu_engines.wanted_variants(VARIANTS, "SM90") == (VARIANTS, {})


def test_without_a_gpu_it_says_so_and_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(frozenset(), None)
    monkeypatch.setattr("spike_export.engines.plan.backend.detect_machine", lambda: machine)
    assert gpu.main([]) == 2
    assert capsys.readouterr() == ("", "gpu: no NVIDIA GPU was found; run this on the machine that has one\n")
    if not torch.cuda.is_available():
        reason = gpu.no_gpu(HOPPER)
        assert reason is not None
        assert reason.endswith("does not see the NVIDIA H200; install torch with CUDA")


def test_the_drivers_version_is_read(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2026\nGCC: 12\n"
    )
    assert gpu.driver_version(file) == "580.95.05"
    assert gpu.driver_version(tmp_path / "none") == "unknown"


@pytest.mark.parametrize("kind", ["float16", "int8", "fp8"])
def test_products_are_of_the_shapes_that_are_told(kind: Any) -> None:
    make, multiply = gpu_torch.MULTIPLIERS[kind]
    device = torch.device("cpu")
    left, right = make((32, 16), device), make((64, 16), device).t()
    if kind == "fp8":
        expected = (left.float() @ right.float()).to(torch.float16)
    else:
        exact = torch.float64 if kind == "int8" else torch.float32
        expected = left.to(exact) @ right.to(exact)
    product = multiply(left, right)
    assert product.shape == (32, 64)
    torch.testing.assert_close(product.to(expected.dtype), expected, rtol=2e-3, atol=2e-2)


def host_seconds(work: Callable[[], object], repeats: int = 3) -> list[float]:
    seconds = []
    for _ in range(gpu_torch.WARM_UP + repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds[gpu_torch.WARM_UP :]


@pytest.mark.usefixtures("one_thread")
def test_the_harness_runs_over_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exports, plans, comparison and timing are the harness's own; only GPU, compiler and clock are not."""
    simulation = simulate(monkeypatch, tmp_path)
    model = tiny_llama(layers=1)
    recipe = tiny_recipe(
        model.checkpoint, input_scales(model, np.random.default_rng(0).integers(0, 99, (2, 16))), prefix=(5,)
    )
    machine = Machine(frozenset({"tensorrt"}), HOPPER.gpu)

    def build(bundle: Path, plan: Path, options: Any) -> ProvidedEngine:
        if "fp8" in plan.name:
            raise EngineError("TensorRT cannot build the plan: no kernel")
        assert (options.targets, options.max_prompt) == (("SM90",), 16)
        batch = options.batch.largest
        checked = simulation.plan(bundle, "prefill", "decode", batch=batch, context=64, prompt=32)
        return ProvidedEngine((checked.path,), (checked.sidecar,), "built", reused=False)

    monkeypatch.setattr(plan_reuse, "provide_engine", build)
    monkeypatch.setattr(trt_decoding, "CudaDevice", lambda _: simulation.device)
    monkeypatch.setattr(gpu_engines, "gpu_seconds", host_seconds)
    capacity = 64
    bundles = gpu_engines.export_variants(model.checkpoint, recipe, VARIANTS, capacity, tmp_path / "bundles")
    formats = {bundle.variant.name: set(load_manifest(bundle.folder).linears) for bundle in bundles}
    assert formats == {"FP16": {"float16"}, "W8A8": {"int8"}, "W8A16": {"float16+int8-weights"}, "FP8": {"fp8"}}
    assert {bundle.manifest.prefix for bundle in bundles} == {None}
    harness = gpu_engines.Harness(Model.of(model.checkpoint.config), PEAKS, machine, tmp_path, repeats=3)
    measured = calls([1, 3], 16, capacity)
    harness.measure_plans(bundles, measured)
    assert {(timed.variant, timed.call) for timed in harness.timed} == {
        (name, call) for name in ("FP16", "W8A8", "W8A16") for call in measured
    }
    assert all(timed.calls == 3 and timed.seconds > 0 for timed in harness.timed)
    # The pretended compiler computes with ONNX Runtime: what is compared must be the same tokens.
    assert {(parity.variant, parity.agreement) for parity in harness.parity} == {
        (name, 1.0) for name in ("FP16", "W8A8", "W8A16")
    }
    assert harness.skipped == {
        "TensorRT-RTX": f"not installed; run: {TENSORRT_RTX.install}",
        "tensorrt, FP8, batch 1": "TensorRT cannot build the plan: no kernel",
        "tensorrt, FP8, batch 3": "TensorRT cannot build the plan: no kernel",
    }
    harness.measure_onnx_runtime(bundles, measured)
    assert "onnxruntime-gpu" in harness.skipped
    # A provider that is named and does not start must not leave the CPU's time as the GPU's.
    before = len(harness.timed)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    harness.measure_onnx_runtime(bundles[:1], measured[:1])
    assert len(harness.timed) == before
    assert "could not start its CUDAExecutionProvider" in harness.skipped[f"onnxruntime-gpu, FP16, {measured[0].name}"]


def test_bundles_are_used_again_only_for_the_same_model_recipe_and_capacity(tmp_path: Path) -> None:
    model, other = tiny_llama(layers=1), tiny_llama(layers=1, seed=1)
    ids = np.random.default_rng(0).integers(0, 99, (2, 16))
    recipe, changed = (tiny_recipe(model.checkpoint, input_scales(model, tokens)) for tokens in (ids, ids[:1]))

    def written(model: TinyModel, recipe: Any, capacity: int) -> int:
        (bundle,) = gpu_engines.export_variants(model.checkpoint, recipe, [W8A8], capacity, tmp_path)
        assert bundle.manifest.capacity == capacity
        return (bundle.folder / "manifest.json").stat().st_mtime_ns

    stamps = [written(model, recipe, 16), written(model, recipe, 16), written(model, recipe, 32)]
    assert stamps[0] == stamps[1] < stamps[2]
    assert written(model, changed, 32) > stamps[2]
    foreign = tiny_recipe(other.checkpoint, input_scales(other, ids))
    assert written(other, foreign, 32) > stamps[2]
    (tmp_path / "w8a8" / "manifest.json").write_text("{")
    written(other, foreign, 32)


def test_peaks_and_products_are_measured_for_what_can_be_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 8.9\nmore")

    monkeypatch.setattr(gpu_torch, "gpu_seconds", host_seconds)
    monkeypatch.setattr(gpu_torch, "_SIDE", 64)
    monkeypatch.setattr(gpu_torch, "_FAR_APART", 10_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 22, 1 << 23))
    monkeypatch.setitem(gpu_torch.MULTIPLIERS, "fp8", (gpu_torch.MULTIPLIERS["fp8"][0], refuse))
    device = torch.device("cpu")
    seen, missing = gpu_torch.peaks(device)
    assert set(seen.operations) == {"float16", "int8"}
    assert seen.bandwidth > 0
    assert missing == {
        "torch products in fp8": "torch._scaled_mm is only supported on CUDA devices with compute capability >= 8.9"
    }
    model = Model(((16, 32), (16, 32), (32, 16)), 1, 1, 1, 16, 32, 8)
    products, refused = gpu_torch.model_products(model, [1, 48], ["float16", "int8"], device)
    assert refused == {}
    assert [(one.kind, one.rows, one.linear) for one in products] == [
        (kind, max(rows, 32) if kind == "int8" else rows, linear)
        for linear in ((16, 32), (32, 16))
        for rows in (1, 48)
        for kind in ("float16", "int8")
    ]
    assert all(one.rate > 0 for one in products)
    products, refused = gpu_torch.model_products(model, [1], ["float16", "fp8"], device)
    assert [one.kind for one in products] == ["float16"] * 2
    assert refused == {f"torch fp8, 1 x {shape}": missing["torch products in fp8"] for shape in ("32 x 16", "16 x 32")}


@pytest.mark.parametrize(("error", "code"), [(0.01, 0), (0.5, 1)])
def test_a_run_prints_the_table_and_writes_the_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: float, code: int
) -> None:
    measured = report()
    measured.parity = [Parity("tensorrt", "FP16", error, 1.0, 0.02)]
    monkeypatch.setattr("spike_export.engines.plan.backend.detect_machine", lambda: HOPPER)
    monkeypatch.setattr(gpu, "no_gpu", lambda _: None)
    monkeypatch.setattr(gpu, "_measure", lambda *_: measured)
    assert gpu.main(["--results", str(tmp_path), "--batches", "4"]) == code
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("nvidia-h200-20")
    assert json.loads(written.read_text())["parity"][0]["error"] == error
    assert capsys.readouterr().out == f"{text(measured)}\nwritten: {written}\n"


def test_a_model_that_cannot_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spike_export.engines.plan.backend.detect_machine", lambda: HOPPER)
    monkeypatch.setattr(gpu, "no_gpu", lambda _: None)
    assert gpu.main(["/no/such/model"]) == 2
    assert re.fullmatch(r"gpu: .*/no/such/model.*\n", capsys.readouterr().err)
