"""What the TensorRT runtime refuses before the GPU is touched, how it asks for memory, and what it sets and keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.plan.build_options import ProfileName
from spike_export.engines.plan.build_profiles import Profile, ShapeRange
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.plan.sidecar import PlanSidecar
from spike_export.engines.tensorrt.buffers import Buffers
from spike_export.engines.tensorrt.decoding import TensorRtDecoding
from spike_export.engines.tensorrt.device import ALIGNMENT, CudaDevice
from spike_export.engines.tensorrt.engines import RuntimeOptions, specialization
from spike_export.engines.tensorrt.kv_cache import CACHE
from spike_export.engines.tensorrt.limits import PlanLimits, plan_limits, require_fit
from spike_export.engines.tensorrt.prefill import dynamic_calls, static_calls
from spike_export.engines.tensorrt.runtime_cache import RuntimeCache, runtime_cache_path
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import tiny_llama, unquantized_recipe
from tests.support.trt_simulation import (
    CAPACITY,
    PROMPTS,
    SCRATCH_BYTES,
    Greedy,
    SimulatedConfig,
    SimulatedDevice,
    SimulatedEngine,
    Simulation,
    decoded,
    sidecar,
    simulate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = PlanLimits(smallest_batch=2, largest_batch=4, prefill_batch=4, call=8, chunked=True, context=20, prefix=3)


@pytest.fixture(scope="module")
def static_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = tiny_llama(), tmp_path_factory.mktemp("bundles") / "static"
    options = ExportOptions("float32", logits="last", cache=CacheOptions("static", CAPACITY))
    export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint), options, folder)
    return folder


@pytest.fixture(scope="module")
def dynamic_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = tiny_llama(), tmp_path_factory.mktemp("bundles") / "dynamic"
    export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint), ExportOptions("float32"), folder)
    return folder


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulation:
    return simulate(monkeypatch, tmp_path)


def opened(simulation: Simulation, plans: Sequence[CheckedPlan], **options: Any) -> TensorRtDecoding:
    return TensorRtDecoding(plans, Greedy, RuntimeOptions(**options), simulation.device)


def prompts(*lengths: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    return [np.arange(length, dtype=np.int64) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "new", "message"),
    [
        ((), 1, "a batch of 0 was given and the plan was built for 2 to 4 sequences; give 2 or more"),
        ((1,), 1, "a batch of 1 was given and the plan was built for 2 to 4 sequences; give 2 or more"),
        ((1,) * 5, 1, "a batch of 5 .* 2 to 4 sequences; give fewer at a time, or build again with --max-batch 5"),
        ((3, 0), 1, r"prompt 1 has the shape \[0\]; expected one token or more"),
        ((3, 18), 4, "prompt 1 has 18 tokens and may get 4: that takes a context of 21, and the plan was built for 20"),
    ],
)
def test_requests_beyond_the_plan_are_refused_with_both_figures(
    lengths: tuple[int, ...], new: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        require_fit(LIMITS, prompts(*lengths), new, 99)
    require_fit(LIMITS, prompts(3, 18), 3, 99)


@pytest.mark.parametrize("token", [99, -1])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(EngineError, match=rf"prompt 1 holds token {token}; the vocabulary has 0 to 98"):
        require_fit(LIMITS, [np.array([3]), np.array([5, token, 7])], 1, 99)


def test_a_prompt_that_must_enter_at_once_is_held_against_the_call() -> None:
    one_call = PlanLimits(1, 4, 1, call=8, chunked=False, context=20, prefix=3)
    require_fit(one_call, prompts(8), 1, 99)
    with pytest.raises(EngineError, match="prompt 0 has 9 tokens and the plan takes 8 in the one call"):
        require_fit(one_call, prompts(9), 1, 99)


def test_nothing_runs_for_a_request_that_is_refused(simulation: Simulation, static_bundle: Path) -> None:
    runtime = opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])
    for batch, new in ((PROMPTS * 2, 1), (PROMPTS, CAPACITY)):
        with pytest.raises(EngineError):
            runtime.decode(batch, GenerationOptions(max_new_tokens=new))
    assert simulation.device.log == []


def range_of(*shapes: tuple[int, ...]) -> ShapeRange:
    return ShapeRange(*shapes)


def written(
    *names: ProfileName, smallest: int = 1, largest: int = 4, mask: bool = False, **changes: Any
) -> PlanSidecar:
    profiles = []
    for name in names:
        columns = 1 if name == "decode" else 8
        shapes = {"input_ids": range_of((smallest, 1), (smallest, 1), (largest, columns))}
        if mask:
            shapes["attention_mask"] = range_of((smallest, 1), (smallest, 1), (largest, columns))
        profiles.append(Profile(name, shapes))
    return sidecar("tensorrt", profiles, 3, 20).model_copy(update=changes)


def test_limits_of_both_forms() -> None:
    expected = PlanLimits(1, 4, 4, 8, chunked=True, context=20, prefix=3)
    assert plan_limits([written("prefill", "decode")]) == expected
    assert plan_limits([written("decode"), written("prefill")]) == expected
    # A padded batch has to fit into both profiles.
    narrow = plan_limits([written("prefill", mask=True, largest=2), written("decode", mask=True, smallest=2)])
    assert (narrow.smallest_batch, narrow.largest_batch) == (2, 2)


@pytest.mark.parametrize(
    ("sidecars", "message"),
    [
        ([written("decode")], "one prefill and one decode profile, and there are: decode; build with --profiles both"),
        ([written("prefill", "decode"), written("decode")], "there are: prefill, decode, decode"),
        ([written("prefill"), written("decode", bundle_sha256="1")], "bundle_sha256 is 0 and 1; build both again"),
        ([written("prefill"), written("decode", max_context=30)], "max_context is 20 and 30"),
        ([sidecar("tensorrt", [Profile("prefill", {}), Profile("decode", {})], 0, 8)], "no shape of input_ids in its"),
        ([written("prefill", "decode", smallest=2)], "the prefill profile begins at 2 sequences"),
    ],
)
def test_plans_that_do_not_go_together_are_refused(sidecars: list[PlanSidecar], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        plan_limits(sidecars)


def test_calls_of_a_static_cache_have_no_padding() -> None:
    batch = prompts(3, 3, 3, 20, 3)
    limits = PlanLimits(1, 8, 2, call=8, chunked=True, context=30, prefix=0)
    calls = list(static_calls(batch, limits, together=True))
    shapes = [(call.row, call.tokens.shape, call.earlier, call.ends) for call in calls]
    assert shapes == [
        (0, (2, 3), 0, True),
        (2, (1, 3), 0, True),
        (3, (1, 7), 0, False),
        (3, (1, 7), 7, False),
        (3, (1, 6), 14, True),
        (4, (1, 3), 0, True),
    ]
    fed = {row: [call.tokens for call in calls if call.row == row] for row in (0, 3)}
    np.testing.assert_array_equal(np.concatenate(fed[3], axis=1)[0], batch[3])
    assert all(call.rows == 1 for call in static_calls(batch, limits, together=False))


def test_calls_of_a_dynamic_cache_are_padded_on_the_left() -> None:
    (call,) = dynamic_calls(prompts(2, 4), LIMITS)
    np.testing.assert_array_equal(call.tokens, [[0, 0, 0, 1], [0, 1, 2, 3]])
    assert (call.row, call.earlier, call.ends) == (0, 0, True)


def test_memory_is_asked_for_before_it_is_taken(static_bundle: Path, simulation: Simulation) -> None:
    runtime = opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])
    simulation.device.budget -= simulation.device.free_bytes() - 20_000
    # Of each of 4 tensors: 4 rows, 2 heads, 24 slots, 16 channels of 4 bytes.
    message = (
        r"^the GPU has 0\.00 GiB free \(20000 bytes\) and 0\.00 GiB \(\d+ bytes\) are needed: key/value cache 0\.00 GiB"
        ".*; take a smaller batch or fewer tokens, export with --logits last"
    )
    with pytest.raises(EngineError, match=message) as caught:
        next(runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=2)))
    needed = int(str(caught.value).split("(")[2].split()[0])
    assert 4 * 4 * 2 * 24 * 16 * 4 <= needed < 4 * 4 * 2 * 24 * 16 * 4 + 10_000
    assert simulation.device.free_bytes() == 20_000
    # One row fits, and then runs.
    assert len(decoded(runtime, PROMPTS[:1], 2)) == 1


def test_memory_in_pieces_ends_in_the_same_error(static_bundle: Path, simulation: Simulation) -> None:
    runtime = opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])
    simulation.device.fragmented = True
    with pytest.raises(EngineError, match=r"the GPU has \d\.\d\d GiB free .* are needed: .*; take a smaller batch"):
        next(runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=2)))
    simulation.device.fragmented = False
    assert len(decoded(runtime, PROMPTS, 2)) == 4


def test_a_sampler_that_exhausts_the_gpu_is_told_with_the_remedy(static_bundle: Path, simulation: Simulation) -> None:
    class Greedier(Greedy):
        def draw(self, logits: torch.Tensor, seen: torch.Tensor | None) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    plan = simulation.plan(static_bundle, "prefill", "decode")
    runtime = TensorRtDecoding([plan], Greedier, RuntimeOptions(), simulation.device)
    with pytest.raises(EngineError, match=r"Tried to allocate 2\.00 GiB; take a smaller batch"):
        next(runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=2)))


def test_pieces_keep_their_place_until_they_grow() -> None:
    device = SimulatedDevice(budget=4096)
    buffers = Buffers(device)
    assert buffers.reserve({"a": 1000, "b": 0}) == {"a", "b"}
    place = buffers.address("a")
    assert place % ALIGNMENT == 0
    assert buffers.reserve({"a": 1024, "b": ALIGNMENT}) == frozenset()
    assert buffers.reserve({"a": 1025}) == {"a"}
    assert buffers.view("a", (3, 5), torch.float16).shape == (3, 5)
    with pytest.raises(AssertionError, match="was reserved with 1280 bytes"):
        buffers.view("a", (1281,), torch.uint8)
    # What a piece holds already counts as free when it has to grow.
    assert buffers.reserve({"a": 3840}) == {"a"}
    with pytest.raises(EngineError):
        buffers.reserve({"a": 3841})


def test_pieces_that_moved_are_told_though_a_later_one_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    buffers = Buffers(device)
    assert buffers.reserve({"a": 1000, "b": 1000}) == {"a", "b"}
    allocate, sizes = device.allocate, list[int]()

    def second_fails(size: int) -> torch.Tensor:
        sizes.append(size)
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(size)

    monkeypatch.setattr(device, "allocate", second_fails)
    with pytest.raises(EngineError, match="are needed"):
        buffers.reserve({"a": 2000, "b": 2000})
    assert buffers.reserve({"a": 2000, "b": 1000}) == {"a", "b"}


def test_a_cache_is_zero_before_it_is_used(static_bundle: Path, simulation: Simulation) -> None:
    """The pretended device hands out memory full of NaN."""
    runtime = opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])
    decoded(runtime, PROMPTS[:2], 2)
    buffers = runtime._steps._buffers  # type: ignore[attr-defined]
    assert torch.isfinite(buffers.view(CACHE, (4 * 2 * 2 * CAPACITY * 16,), torch.float32)).all()


def test_the_scratch_memory_is_that_of_the_larger_profile(static_bundle: Path, simulation: Simulation) -> None:
    opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])
    (context,) = simulation.trt.engines[0].contexts
    assert context.memory is not None
    assert context.memory[1] == max(SCRATCH_BYTES.values())


def test_a_plan_that_does_not_write_in_place_is_refused(static_bundle: Path, simulation: Simulation) -> None:
    simulation.trt.aliases = False
    with pytest.raises(EngineError, match=r"does not write present\.0\.key into past_key_values\.0\.key"):
        opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])


def test_plans_of_other_kinds_are_refused(
    static_bundle: Path, dynamic_bundle: Path, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = simulation.plan(static_bundle, "prefill", "decode")
    plan.path.write_text("a plan of another program")
    with pytest.raises(EngineError, match=r"TensorRT cannot load the plan of 1 bytes.*Serialization assertion failed"):
        opened(simulation, [plan])
    plan.path.unlink()
    with pytest.raises(EngineError, match=r"prefill-decode\.plan: cannot read the plan"):
        opened(simulation, [plan])
    split = [simulation.plan(static_bundle, "prefill"), simulation.plan(dynamic_bundle, "decode")]
    with pytest.raises(EngineError, match="the prefill plan and the decode plan differ in inputs or outputs"):
        opened(simulation, split)
    simulation.trt.profiles["prefill"] *= 2
    with pytest.raises(EngineError, match=r"prefill\.plan has 2 profiles and its sidecar names 1"):
        opened(simulation, split)


def test_weights_that_do_not_fit_are_told_with_both_figures(static_bundle: Path, simulation: Simulation) -> None:
    simulation.trt.weights, simulation.device.budget = 5000, 4000
    message = r"plan of 1 bytes with 4000 bytes free on the GPU: Requested amount of GPU memory could not be allocated"
    with pytest.raises(EngineError, match=message + "; free memory on the GPU, or build with --weight-streaming"):
        opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])


@pytest.mark.parametrize(("change", "odd"), [("position_ids", "position_ids"), ("encoder_states", "encoder_states")])
def test_an_unknown_input_is_named(
    static_bundle: Path, simulation: Simulation, monkeypatch: pytest.MonkeyPatch, change: str, odd: str
) -> None:
    original = SimulatedEngine.get_tensor_name

    def renamed(engine: SimulatedEngine, index: int) -> str:
        name = original(engine, index)
        return change if name == "write_indices" else name

    monkeypatch.setattr(SimulatedEngine, "get_tensor_name", renamed)
    monkeypatch.setattr(
        SimulatedEngine,
        "get_tensor_mode",
        lambda engine, name: getattr(engine.trt.TensorIOMode, "OUTPUT" if name in engine.outputs else "INPUT"),
    )
    with pytest.raises(EngineError, match=rf"not one of a decoder that this version exports \({odd}\)"):
        opened(simulation, [simulation.plan(static_bundle, "prefill", "decode")])


def test_weights_are_streamed_within_a_budget(static_bundle: Path, simulation: Simulation) -> None:
    plan = simulation.plan(static_bundle, "prefill", "decode")
    with pytest.raises(EngineError, match="the plan's weights cannot be streamed; build it with --weight-streaming"):
        opened(simulation, [plan], weight_budget=100)
    simulation.trt.streamable = 500
    for budget, expected in ((100, 100), (900, 500), (None, 500), (0, 0), ("auto", 250)):
        opened(simulation, [plan], weight_budget=budget)
        assert simulation.trt.engines[-1].weight_streaming_budget_v2 == expected
    with pytest.raises(EngineError, match="weight_budget is -1"):
        RuntimeOptions(weight_budget=-1)


def configurations(simulation: Simulation) -> list[SimulatedConfig]:
    return [context.config for engine in simulation.trt.engines for context in engine.contexts if context.config]


@pytest.mark.parametrize("graphs", [True, False])
def test_rtx_is_told_when_to_compile_and_to_make_graphs(
    static_bundle: Path, dynamic_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, graphs: bool
) -> None:
    simulation = simulate(monkeypatch, tmp_path, "tensorrt-rtx")
    trt = simulation.trt
    for bundle, decode, captures in ((static_bundle, "EAGER", graphs), (dynamic_bundle, "NONE", False)):
        trt.engines.clear()
        runtime = opened(simulation, [simulation.plan(bundle, "prefill", "decode")], cuda_graphs=graphs)
        decoded(runtime, PROMPTS, 2)
        told = [
            (config.dynamic_shapes_kernel_specialization_strategy, config.cuda_graph_strategy)
            for config in configurations(simulation)
        ]
        when, how = trt.DynamicShapesKernelSpecializationStrategy, trt.CudaGraphStrategy
        whole = how.WHOLE_GRAPH_CAPTURE if captures else how.DISABLED
        assert told == [(when.LAZY, how.DISABLED), (getattr(when, decode), whole)]
    assert {specialization(name, static=True) for name in ("prefill", "decode")} == {"LAZY", "EAGER"}


def test_what_rtx_compiled_is_there_at_the_next_start(
    static_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulation = simulate(monkeypatch, tmp_path, "tensorrt-rtx")
    plan = simulation.plan(static_bundle, "prefill", "decode")
    kept = runtime_cache_path(plan.path)
    assert kept == tmp_path / "prefill-decode.runtime-cache"
    with opened(simulation, [plan]) as runtime:
        decoded(runtime, PROMPTS, 2)
        assert b"decode(4, 1)" in kept.read_bytes()  # nobody has to close it for that
        decoded(runtime, PROMPTS[:1], 2)
        assert b"decode(1, 1)" in kept.read_bytes()
    with opened(simulation, [plan]) as runtime:
        assert "decode(4, 1)" in simulation.trt.engines[-1].contexts[0].config.cache.kernels  # type: ignore[union-attr]
    kept.unlink()
    with opened(simulation, [plan], runtime_cache=False) as runtime:
        decoded(runtime, PROMPTS, 2)
    assert not kept.exists()


def test_a_kernel_cache_of_another_gpu_is_replaced_and_one_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "engine.runtime-cache"
    path.write_bytes(b"of another GPU")
    cache = RuntimeCache.open(SimulatedConfig(), path)
    assert not cache.loaded
    cache.handle.kernels.add("a")
    assert cache.save()
    assert not cache.save()
    again = RuntimeCache.open(SimulatedConfig(), path)
    assert (again.loaded, again.handle.kernels) == (True, {"a"})
    assert not again.save()
    (tmp_path / "file").write_text("")
    nowhere = RuntimeCache.open(SimulatedConfig(), tmp_path / "file" / "engine.runtime-cache")
    nowhere.handle.kernels.add("a")
    assert not nowhere.save()
    assert not RuntimeCache.open(SimulatedConfig(), None).save()


def test_without_a_gpu_one_sentence_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"a plan runs on an NVIDIA GPU.* run the bundle, which needs no GPU"):
        CudaDevice()


def test_a_missing_backend_is_named(
    static_bundle: Path, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    plan = simulation.plan(static_bundle, "prefill", "decode")
    monkeypatch.undo()
    with pytest.raises(EngineError, match=r"TensorRT cannot be loaded .* run: pip install 'spike-export\[tensorrt\]'"):
        opened(simulation, [plan])


def test_lag_is_not_negative() -> None:
    with pytest.raises(EngineError, match="lag is -1; expected 0 steps or more"):
        RuntimeOptions(lag=-1)
