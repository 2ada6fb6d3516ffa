"""The TensorRT runtime over a pretended GPU: its tokens are transformers', whatever the batch, cache and plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import LogitsScope
from spike_export.engines.generation.decoding import DecodedStep
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.plan.backend import BackendName
from spike_export.engines.plan.safety import CheckedPlan
from spike_export.engines.tensorrt.capacities import CapacityChoice
from spike_export.engines.tensorrt.decoding import TensorRtDecoding
from spike_export.engines.tensorrt.engines import RuntimeOptions
from spike_export.engines.tensorrt.sampling import Drawn
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support import graph_parity
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe
from tests.support.trt_simulation import (
    CAPACITY,
    PROMPTS,
    DeviceFaultError,
    Greedy,
    SimulatedContext,
    Simulation,
    decoded,
    simulate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (5, 1, 9)


@dataclass(frozen=True)
class Case:
    """A bundle of the matrix."""

    static: bool
    prefix: tuple[int, ...]
    logits: LogitsScope

    @property
    def name(self) -> str:
        return f"{'static' if self.static else 'dynamic'}-{len(self.prefix)}-{self.logits}"


CASES = [
    Case(static, prefix, logits) for static in (True, False) for prefix in ((), PREFIX) for logits in ("all", "last")
]
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> dict[Case, Path]:
    folders = {}
    for case in CASES:
        folders[case] = tmp_path_factory.mktemp("bundles") / case.name
        cache = CacheOptions("static", CAPACITY) if case.static else CacheOptions()
        recipe = unquantized_recipe(model.checkpoint, case.prefix)
        export_bundle(
            model.checkpoint, recipe, ExportOptions("float32", logits=case.logits, cache=cache), folders[case]
        )
    return folders


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Simulation:
    return simulate(monkeypatch, tmp_path)


def opened(simulation: Simulation, *plans: CheckedPlan, options: RuntimeOptions | None = None) -> TensorRtDecoding:
    return TensorRtDecoding(plans, Greedy, options or RuntimeOptions(), simulation.device)


def reference(model: TinyModel, prompt: NDArray[np.int64], count: int, prefix: tuple[int, ...]) -> list[int]:
    """transformers' greedy continuation, each token from the whole sequence anew."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(graph_parity.reference_logits(model, np.array([ids]), prefix)[0, -1].argmax()))
    return ids[len(prompt) :]


@each_case
@pytest.mark.parametrize("split", [False, True], ids=["both", "split"])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_rows_of_any_length_get_the_tokens_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundles: dict[Case, Path],
    model: TinyModel,
    case: Case,
    split: bool,
    backend: BackendName,
) -> None:
    simulation = simulate(monkeypatch, tmp_path, backend)
    names = [("prefill",), ("decode",)] if split else [("prefill", "decode")]
    plans = [simulation.plan(bundles[case], *each) for each in names]  # type: ignore[arg-type]
    with opened(simulation, *plans) as runtime:
        # A second batch of other rows finds what the first one left.
        for prompts in (PROMPTS, PROMPTS[::-1][:2]):
            expected = [reference(model, prompt, 6, case.prefix) for prompt in prompts]
            assert decoded(runtime, prompts, 6) == expected


@each_case
def test_logits_are_those_of_transformers(
    simulation: Simulation, bundles: dict[Case, Path], model: TinyModel, case: Case
) -> None:
    ids = np.random.default_rng(3).integers(0, 99, (3, 12))
    runtime = opened(simulation, simulation.plan(bundles[case], "prefill", "decode"))
    logits = runtime.logits(ids[:, :7], ids[:, 7:])
    graph_parity.assert_close(logits, graph_parity.reference_logits(model, ids, case.prefix)[:, 6:])


@pytest.mark.parametrize("case", [case for case in CASES if not (case.static and case.prefix)], ids=lambda c: c.name)
def test_a_prompt_longer_than_a_call_enters_in_several(
    simulation: Simulation, bundles: dict[Case, Path], model: TinyModel, case: Case
) -> None:
    prompts = [np.arange(1, 14), np.arange(30, 33)]
    runtime = opened(simulation, simulation.plan(bundles[case], "prefill", "decode", prompt=5))
    assert decoded(runtime, prompts, 4) == [reference(model, prompt, 4, case.prefix) for prompt in prompts]
    columns = [shape[1] for name, shape in simulation.trt.runs if name == "prefill"]
    assert columns == ([5, 5, 3, 3] if case.static else [5, 5, 3])


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
def test_a_sliding_window_ends_where_transformers_does(
    simulation: Simulation, tmp_path: Path, static: bool, prefix: tuple[int, ...]
) -> None:
    """The window counts slots, and padding on the left is among them, in front of all tokens of its row."""
    windowed = tiny_llama(sliding_window=6)
    cache = CacheOptions("static", CAPACITY) if static else CacheOptions()
    options = ExportOptions("float32", logits="last", cache=cache)
    export_bundle(windowed.checkpoint, unquantized_recipe(windowed.checkpoint, prefix), options, tmp_path / "bundle")
    prompt = 16 if static and prefix else 5
    runtime = opened(simulation, simulation.plan(tmp_path / "bundle", "prefill", "decode", prompt=prompt))
    prompts = [np.arange(1, 14), np.arange(30, 33), np.arange(50, 58)]
    assert decoded(runtime, prompts, 8) == [reference(windowed, tokens, 8, prefix) for tokens in prompts]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 10,
            "factor": 4.0,
            "short_factor": [1.1] * 8,
            "long_factor": [2.0] * 8,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_prompt_enters_at_once_where_its_length_decides_how_it_is_rotated(
    simulation: Simulation, tmp_path: Path, rope: dict[str, Any]
) -> None:
    scaled = tiny_llama(rope=rope, max_positions=40)
    export_bundle(scaled.checkpoint, None, ExportOptions("float32", logits="last"), tmp_path / "bundle")
    whole = opened(simulation, simulation.plan(tmp_path / "bundle", "prefill", "decode", prompt=13))
    assert decoded(whole, [np.arange(1, 14)], 1) == [reference(scaled, np.arange(1, 14), 1, ())]
    runtime = opened(simulation, simulation.plan(tmp_path / "bundle", "prefill", "decode", prompt=5))
    with pytest.raises(
        EngineError, match=rf"prompt 0 has 13 tokens and the plan takes 5 .* of type {rope['rope_type']}"
    ):
        runtime.decode([np.arange(1, 14)], GenerationOptions(max_new_tokens=1))


def test_the_context_can_be_filled_to_its_last_token(
    simulation: Simulation, bundles: dict[Case, Path], model: TinyModel
) -> None:
    for case in CASES:
        runtime = opened(simulation, simulation.plan(bundles[case], "prefill", "decode"))
        count = CAPACITY - len(PROMPTS[0]) + 1  # the last token is drawn and not fed
        assert decoded(runtime, PROMPTS[:2], count)[0] == reference(model, PROMPTS[0], count, case.prefix)
        with pytest.raises(EngineError, match=f"takes a context of {CAPACITY + 1}, and the plan was built for"):
            runtime.decode(PROMPTS[:2], GenerationOptions(max_new_tokens=count + 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_interleaved_batches_give_each_row_what_it_gets_alone(
    data: st.DataObject, simulation: Simulation, bundles: dict[Case, Path]
) -> None:
    case = data.draw(st.sampled_from(CASES))
    runtime = opened(simulation, simulation.plan(bundles[case], "prefill", "decode"))
    lengths = st.lists(st.integers(1, 12), min_size=1, max_size=4)
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for _ in range(2):
        prompts = [random.integers(0, 99, length) for length in data.draw(lengths)]
        together = decoded(runtime, prompts, 5)
        assert together == [decoded(runtime, [prompt], 5)[0] for prompt in prompts]


def test_equal_neighbours_enter_together_where_only_the_last_logits_are_formed(
    simulation: Simulation, bundles: dict[Case, Path]
) -> None:
    prompts = [np.arange(1, 4), np.arange(5, 8), np.arange(9, 11)]
    shapes = {}
    for logits in ("all", "last"):
        runtime = opened(simulation, simulation.plan(bundles[Case(True, (), logits)], "prefill", "decode"))
        simulation.trt.runs.clear()
        decoded(runtime, prompts, 1)
        shapes[logits] = [shape for _, shape in simulation.trt.runs]
    assert shapes == {"all": [(1, 3), (1, 3), (1, 2)], "last": [(2, 3), (1, 2)]}


def test_the_gpu_is_ahead_of_what_is_handed_out_and_never_waited_for(
    simulation: Simulation, bundles: dict[Case, Path]
) -> None:
    """That nothing in between waits is seen to by the pretended device, which refuses it."""
    runtime = opened(simulation, simulation.plan(bundles[CASES[0]], "prefill", "decode"), options=RuntimeOptions(lag=2))
    log = simulation.device.log
    log.clear()
    steps = runtime.decode(PROMPTS[:1], GenerationOptions(max_new_tokens=6))
    assert log == []
    next(steps)
    assert [entry for entry in log if entry in ("fetch", "wait")] == ["fetch"] * 3 + ["wait"]
    for taken in range(2, 7):
        next(steps)
        fetched, waited = log.count("fetch"), log.count("wait")
        assert (fetched, waited) == (min(taken + 2, 6), taken)
    assert list(steps) == []


def test_waiting_inside_the_queue_is_found(simulation: Simulation, bundles: dict[Case, Path]) -> None:
    class Hasty(Greedy):
        def draw(self, logits: torch.Tensor, seen: torch.Tensor | None) -> Drawn:
            assert logits.max().item() > 0
            return super().draw(logits, seen)

    plan = simulation.plan(bundles[CASES[0]], "prefill", "decode")
    runtime = TensorRtDecoding([plan], Hasty, RuntimeOptions(), simulation.device)
    with pytest.raises(DeviceFaultError, match=r"Tensor\.item makes the host wait"):
        next(runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=2)))


def test_a_static_cache_decodes_by_one_graph_per_batch_size(simulation: Simulation, bundles: dict[Case, Path]) -> None:
    runtime = opened(simulation, simulation.plan(bundles[Case(True, PREFIX, "last")], "prefill", "decode"))
    log = simulation.device.log
    decoded(runtime, PROMPTS, 5)
    assert (log.count("capture"), log.count("replay"), log.count("decode")) == (1, 3, 4)
    decoded(runtime, PROMPTS, 3)  # the same graph
    assert (log.count("capture"), log.count("replay")) == (1, 5)
    decoded(runtime, PROMPTS[:2], 4)  # another one, and the first stays good
    decoded(runtime, PROMPTS, 3)
    assert (log.count("capture"), log.count("replay")) == (2, 9)
    assert len(simulation.trt.engines[0].contexts) == 3


def test_graphs_are_made_anew_when_a_larger_batch_moves_the_cache(
    simulation: Simulation, bundles: dict[Case, Path], model: TinyModel
) -> None:
    runtime = opened(simulation, simulation.plan(bundles[Case(True, (), "last")], "prefill", "decode"))
    for rows in (2, 3, 2, 4, 2):
        prompts = PROMPTS[:rows]
        assert decoded(runtime, prompts, 5) == [reference(model, prompt, 5, ()) for prompt in prompts]
    assert simulation.device.log.count("capture") == 5


def test_a_step_that_cannot_be_captured_is_told_with_the_way_out(
    simulation: Simulation, bundles: dict[Case, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(simulation.device, "capture", refuse)
    plan = simulation.plan(bundles[Case(True, (), "last")], "prefill", "decode")
    runtime = opened(simulation, plan)
    assert len(decoded(runtime, PROMPTS, 2)) == 4  # the first step of a bucket is a plain one
    message = r"cannot be captured .*when stream is capturing\); open the plan with --no-cuda-graphs \(RuntimeOptions\("
    with pytest.raises(EngineError, match=message):
        decoded(runtime, PROMPTS, 3)
    assert len(decoded(opened(simulation, plan, options=RuntimeOptions(cuda_graphs=False)), PROMPTS, 4)) == 4


def test_only_a_static_cache_of_tensorrt_is_captured_by_us(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundles: dict[Case, Path]
) -> None:
    for backend, static, graphs in [
        ("tensorrt", False, True),
        ("tensorrt-rtx", True, True),
        ("tensorrt", True, False),
    ]:
        simulation = simulate(monkeypatch, tmp_path, backend)  # type: ignore[arg-type]
        plan = simulation.plan(bundles[Case(static, (), "last")], "prefill", "decode")
        decoded(opened(simulation, plan, options=RuntimeOptions(cuda_graphs=graphs)), PROMPTS, 5)
        assert "capture" not in simulation.device.log


def test_old_buckets_make_room(simulation: Simulation, bundles: dict[Case, Path]) -> None:
    plan = simulation.plan(bundles[Case(True, (), "last")], "prefill", "decode", batch=12)
    runtime = opened(simulation, plan)
    prompts = [np.array([token]) for token in range(12)]
    decoded(runtime, prompts, 2)
    captures = simulation.device.log.count
    for rows in [*range(1, 10), 1]:
        decoded(runtime, prompts[:rows], 3)
    assert captures("finish") == 3  # nothing is forgotten while it may still run
    assert captures("capture") == 10  # one row's was given up when the ninth came


def test_what_is_drawn_travels_with_the_tokens(simulation: Simulation, bundles: dict[Case, Path]) -> None:
    runtime = opened(simulation, simulation.plan(bundles[CASES[0]], "prefill", "decode"))
    (step, *_) = runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=2, logprobs=2))
    assert isinstance(step, DecodedStep)
    assert step.tokens.dtype == np.int64
    assert step.top_tokens is not None
    assert step.top_logprobs is not None
    assert step.logprobs is not None
    np.testing.assert_array_equal(step.top_tokens[:, 0], step.tokens)
    np.testing.assert_array_equal(step.top_logprobs[:, 0], step.logprobs)
    assert step.top_tokens.shape == (4, 2)


def test_seen_tokens_are_those_of_prompt_and_continuation(simulation: Simulation, bundles: dict[Case, Path]) -> None:
    runtime = opened(simulation, simulation.plan(bundles[CASES[0]], "prefill", "decode"))
    steps = list(runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=10, repetition_penalty=2.0)))
    for row, prompt in enumerate(PROMPTS):
        tokens = [int(step.tokens[row]) for step in steps]
        assert len({*prompt.tolist(), *tokens}) == len(set(prompt.tolist())) + 10


def test_one_batch_at_a_time(simulation: Simulation, bundles: dict[Case, Path], model: TinyModel) -> None:
    runtime = opened(simulation, simulation.plan(bundles[CASES[0]], "prefill", "decode"))
    first = runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=4))
    next(first)
    with pytest.raises(EngineError, match="decoding another batch; read that to its end or close it first"):
        next(runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=4)))
    first.close()  # type: ignore[attr-defined]
    assert decoded(runtime, PROMPTS[:1], 3) == [reference(model, PROMPTS[0], 3, ())]


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_closing_gives_all_memory_back(simulation: Simulation, bundles: dict[Case, Path], static: bool) -> None:
    free = simulation.device.free_bytes()
    runtime = opened(simulation, simulation.plan(bundles[Case(static, (), "last")], "prefill", "decode"))
    decoded(runtime, PROMPTS, 3)
    stopped = runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=9))
    next(stopped)
    assert simulation.device.free_bytes() < free
    runtime.close()
    assert simulation.device.free_bytes() == free
    for steps in (stopped, runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=2))):
        with pytest.raises(EngineError, match="the plan is closed; open it again"):
            list(steps)
    runtime.close()


def test_prefill_and_decode_share_scratch_memory_and_cache(simulation: Simulation, bundles: dict[Case, Path]) -> None:
    runtime = opened(simulation, simulation.plan(bundles[Case(True, (), "last")], "prefill", "decode"))
    decoded(runtime, PROMPTS, 3)
    prefill, decode = simulation.trt.engines[0].contexts
    assert prefill.memory == decode.memory
    for name in ("past_key_values.0.key", "present.1.value"):
        # Prefill ended with the last row, which is a part of the buffers that decode has.
        assert prefill.addresses[name] > decode.addresses[name]
    assert decode.addresses["past_key_values.1.key"] == decode.addresses["present.1.key"]


def test_a_growing_cache_takes_turns_between_two_buffers(simulation: Simulation, bundles: dict[Case, Path]) -> None:
    runtime = opened(simulation, simulation.plan(bundles[Case(False, (), "last")], "prefill", "decode"))
    decoded(runtime, PROMPTS, 3)
    before = simulation.device.free_bytes()
    decoded(runtime, PROMPTS, 3)
    assert simulation.device.free_bytes() == before


@pytest.mark.parametrize("capacity", [CAPACITY, 25])
def test_rows_that_begin_where_tensorrt_takes_no_address_are_staged(
    simulation: Simulation, tmp_path: Path, model: TinyModel, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of [2 heads, 25 slots, 16] float32 has 3,200 bytes, 12.5 times 256."""
    bundle = tmp_path / "bundle"
    recipe = unquantized_recipe(model.checkpoint)
    options = ExportOptions("float32", logits="last", cache=CacheOptions("static", capacity))
    export_bundle(model.checkpoint, recipe, options, bundle)
    runtime = opened(simulation, simulation.plan(bundle, "prefill", "decode", prompt=3))
    assert decoded(runtime, PROMPTS, 4) == [reference(model, prompt, 4, ()) for prompt in PROMPTS]
    grouped = (2, 3) in [shape for name, shape in simulation.trt.runs if name == "prefill"]
    assert grouped == (capacity == CAPACITY)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("capacity", [CAPACITY, 25, None], ids=["in place", "staged", "dynamic"])
def test_an_overflow_is_told_and_does_not_reach_the_next_batch(
    simulation: Simulation, tmp_path: Path, model: TinyModel, capacity: int | None, sampled: bool
) -> None:
    cache = CacheOptions() if capacity is None else CacheOptions("static", capacity)
    export_bundle(
        model.checkpoint,
        unquantized_recipe(model.checkpoint),
        ExportOptions("float32", logits="last", cache=cache),
        tmp_path / "bundle",
    )
    plan = simulation.plan(tmp_path / "bundle", "prefill", "decode")
    runtime = TensorRtDecoding([plan], device=simulation.device)
    simulation.trt.overflowing = True
    options = GenerationOptions(max_new_tokens=4, do_sample=sampled, repetition_penalty=1.2)
    message = "row 0: the logits are not finite, .* --dtype float32 or bfloat16 and build again"
    with pytest.raises(EngineError, match=message):
        list(runtime.decode(PROMPTS, options))
    simulation.trt.overflowing = False
    for prompts in (PROMPTS[1:3], PROMPTS):
        assert decoded(runtime, prompts, 4) == [reference(model, prompt, 4, ()) for prompt in prompts]


def test_failures_of_tensorrt_are_told(
    simulation: Simulation, bundles: dict[Case, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = opened(simulation, simulation.plan(bundles[CASES[0]], "prefill", "decode"))
    simulation.trt.failing = True
    with pytest.raises(EngineError, match="TensorRT does not run the plan: enqueue failed"):
        next(runtime.decode(PROMPTS, GenerationOptions(max_new_tokens=2)))
    simulation.trt.failing = False
    assert len(decoded(runtime, PROMPTS, 2)) == 4

    # Of the next failure neither what was said of the first is told, nor what follows from its own first line.
    def refuse(*_: object) -> bool:
        simulation.trt.complain("bad address")
        simulation.trt.complain("what follows from that")
        return False

    monkeypatch.setattr(SimulatedContext, "set_tensor_address", refuse)
    with pytest.raises(EngineError, match=r"TensorRT does not take the address of .*: bad address$"):
        decoded(runtime, PROMPTS[:2], 2)


def test_the_plan_with_the_least_capacity_that_has_room_decodes(
    simulation: Simulation, tmp_path: Path, model: TinyModel
) -> None:
    runtimes = []
    for capacity in (CAPACITY, 12):
        bundle = tmp_path / f"static-{capacity}"
        options = ExportOptions("float32", logits="last", cache=CacheOptions("static", capacity))
        export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint), options, bundle)
        plan = simulation.plan(bundle, "prefill", "decode", context=capacity, prompt=8)
        runtimes.append(opened(simulation, plan))
    choice = CapacityChoice(runtimes)
    slots = []
    for count in (8, 9, CAPACITY - 4):
        # The first prompt has 5 tokens; the last one that is drawn is not fed.
        assert decoded(choice, PROMPTS[:2], count)[0] == reference(model, PROMPTS[0], count, ())
        running = [engine for engine in simulation.trt.engines if engine.runs]
        slots.append([engine.manifest.capacity for engine in running])
        for engine in running:
            engine.runs = 0
    assert slots == [[12], [CAPACITY], [CAPACITY]]
    with pytest.raises(EngineError, match=f"the plan was built for {CAPACITY}"):
        choice.decode(PROMPTS, GenerationOptions(max_new_tokens=CAPACITY))
    with pytest.raises(EngineError, match="not of one model"):
        CapacityChoice([])
