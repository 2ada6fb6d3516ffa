"""The TensorRT runtime on a real GPU; docs/gpu-verification.md lists what else only a GPU can show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.plan.backend import choose_backend, detect_machine
from spike_export.engines.plan.build_options import BatchRange, BuildOptions
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.tensorrt.decoding import TensorRtDecoding
from spike_export.engines.tensorrt.device import CudaDevice
from spike_export.engines.tensorrt.engines import RuntimeOptions
from spike_export.engines.tensorrt.plan_io import FRESH
from spike_export.engines.tensorrt.runtime_cache import runtime_cache_path
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support import graph_parity
from tests.support.built_plans import build_plan
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe
from tests.support.trt_simulation import PROMPTS, Greedy, decoded


def obstacle() -> str | None:
    """Why nothing can run here."""
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU, or this torch has no CUDA"
    machine = detect_machine()
    try:
        chosen = choose_backend("auto", machine)
    except EngineError as error:
        return str(error)
    targets = chosen.backend.targets
    if targets and machine.gpu is not None and machine.gpu.target not in targets:
        return f"{chosen.backend.title} has no target {machine.gpu.target}"
    return None


REASON = obstacle()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

CONTEXT = 64
PREFIX = (5, 1, 9)

# float16 through two layers: half a unit in 11 bits of mantissa, over some dozens of roundings.
TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama(layers=3)


@pytest.fixture(scope="module", params=["static", "dynamic"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> CheckedPlan:
    folder = tmp_path_factory.mktemp("gpu")
    cache = CacheOptions("static", CONTEXT) if request.param == "static" else CacheOptions()
    recipe = unquantized_recipe(model.checkpoint, PREFIX, "float16")
    export_bundle(model.checkpoint, recipe, ExportOptions("float16", logits="last", cache=cache), folder / "bundle")
    gpu = detect_machine().gpu
    assert gpu is not None
    options = BuildOptions(
        targets=(gpu.target,), batch=BatchRange(1, 4, 4), max_context=CONTEXT, max_prompt=32, typical_prompt=8
    )
    result = build_plan(folder / "bundle", folder / "engine.plan", options)
    return CheckedPlan(result.plan, result.sidecar)


def test_logits_are_those_of_transformers(plan: CheckedPlan, model: TinyModel) -> None:
    ids = np.random.default_rng(3).integers(0, 99, (3, 12))
    with TensorRtDecoding([plan], Greedy) as runtime:
        logits = runtime.logits(ids[:, :7], ids[:, 7:])
    graph_parity.assert_close(logits, graph_parity.reference_logits(model, ids, PREFIX)[:, 6:], TOLERANCE)


def test_graphs_change_nothing_and_rows_do_not_depend_on_the_batch(plan: CheckedPlan) -> None:
    plain = TensorRtDecoding([plan], Greedy, RuntimeOptions(cuda_graphs=False))
    graphs = TensorRtDecoding([plan], Greedy)
    expected = decoded(plain, PROMPTS, 16)
    assert decoded(graphs, PROMPTS, 16) == expected
    assert [decoded(graphs, [prompt], 16)[0] for prompt in PROMPTS] == expected
    assert decoded(graphs, PROMPTS, 16) == expected


def test_rows_come_and_go(plan: CheckedPlan, model: TinyModel) -> None:
    """As a server has them: logits are transformers', whatever the other rows do."""
    with TensorRtDecoding([plan], Greedy) as runtime:
        if FRESH not in plan.sidecar.profiles[0].inputs:
            with pytest.raises(EngineError, match="growing cache"):
                runtime.open_slots(4)
            return
        slots, fed = runtime.open_slots(4), dict[int, list[int]]()

        def compare(row: int, logits: NDArray[np.float32]) -> None:
            expected = graph_parity.reference_logits(model, np.array([fed[row]]), PREFIX)[0, -1]
            graph_parity.assert_close(logits, expected, TOLERANCE)

        for turn, row in enumerate((0, 1, 2, 3, 1, 0, 2)):
            if row in fed:
                slots.release(row)
            fed[row] = PROMPTS[row].tolist()
            compare(row, slots.admit(row, PROMPTS[row]))
            rows = sorted(fed)
            tokens = np.full(len(rows), turn)
            for each, logits in zip(rows, slots.step(rows, tokens), strict=True):
                fed[each].append(turn)
                compare(each, logits)


def test_no_step_waits_for_the_gpu(plan: CheckedPlan) -> None:
    """torch raises at each of its own synchronizations; the first steps may still prepare."""
    runtime = TensorRtDecoding([plan], Greedy)
    steps = runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=24))
    for _ in range(4):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(steps)) == 20
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_closing_gives_the_memory_back_and_keeps_what_was_compiled(plan: CheckedPlan) -> None:
    device = CudaDevice()
    with TensorRtDecoding([plan], Greedy, device=device) as runtime:
        decoded(runtime, PROMPTS, 4)
        allocated, free = torch.cuda.memory_allocated(), device.free_bytes()
    assert torch.cuda.memory_allocated() < allocated
    assert device.free_bytes() > free  # also of weights, which are not torch's
    kept = runtime_cache_path(Path(plan.path))
    assert kept.exists() == (plan.sidecar.backend.name == "tensorrt-rtx")


def test_a_batch_that_does_not_fit_into_the_gpu_is_one_error(
    plan: CheckedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice()
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(1 << 50)
    runtime = TensorRtDecoding([plan], Greedy, device=device)
    monkeypatch.setattr(CudaDevice, "free_bytes", lambda _: 1000)
    with pytest.raises(EngineError, match=r"the GPU has .* free .* are needed: .*; take a smaller batch"):
        decoded(runtime, PROMPTS, 4)
    monkeypatch.undo()
    assert len(decoded(runtime, PROMPTS, 4)) == 4
