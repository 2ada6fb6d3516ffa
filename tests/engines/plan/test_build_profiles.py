from typing import Any

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.build_options import BatchRange, BuildOptions, ProfileName
from spike_export.engines.plan.build_profiles import GraphInput, Limits, Profile, make_profiles, resolve_limits

INPUTS = (
    GraphInput("input_ids", (None, None)),
    GraphInput("attention_mask", (None, None)),
    GraphInput("past_key_values.0.key", (None, 3, None, 64)),
    GraphInput("past_key_values.0.value", (None, 3, None, 64)),
)


STATIC_INPUTS = (
    GraphInput("input_ids", (None, None)),
    GraphInput("write_indices", (None,)),
    GraphInput("fresh", (None,)),
    GraphInput("past_key_values.0.key", (None, 3, 105, 64)),
)


def limits(prefix: int = 5, context: int = 100, typical: int = 16, longest: int = 40) -> Limits:
    return Limits(BatchRange(1, 2, 4), context, typical, longest, prefix)


def profile(name: ProfileName, of: Limits) -> Profile:
    return make_profiles(INPUTS, [name], of)[0]


def test_prefill_starts_fresh_and_reaches_the_last_chunk_after_the_longest_past() -> None:
    shapes = profile("prefill", limits()).shapes
    assert (shapes["input_ids"].smallest, shapes["input_ids"].typical) == ((1, 1), (2, 16))
    assert shapes["input_ids"].largest == (4, 40)
    assert shapes["past_key_values.0.key"].smallest == (1, 3, 0, 64)
    assert shapes["past_key_values.0.key"].largest == (4, 3, 5 + 99, 64)
    assert shapes["attention_mask"].smallest == (1, 1)


def test_decode_takes_one_token_after_the_prefix_and_at_least_one_more() -> None:
    shapes = profile("decode", limits()).shapes
    assert {shapes["input_ids"].smallest[1], shapes["input_ids"].typical[1], shapes["input_ids"].largest[1]} == {1}
    assert shapes["past_key_values.0.value"].smallest == (1, 3, 6, 64)
    assert shapes["past_key_values.0.value"].largest == (4, 3, 5 + 99, 64)
    assert shapes["attention_mask"].largest == (4, 100)


@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("context", [2, 3, 100])
def test_every_corner_is_a_call_that_could_happen(name: ProfileName, prefix: int, context: int) -> None:
    of = limits(prefix, context, typical=min(16, context), longest=min(40, context))
    shapes = profile(name, of).shapes
    for corner in ("smallest", "typical", "largest"):
        new = getattr(shapes["input_ids"], corner)[1]
        past = getattr(shapes["past_key_values.0.key"], corner)[2]
        own = getattr(shapes["attention_mask"], corner)[1]
        assert past + new == own + (prefix if past else 0), corner
    ranges = [(s.smallest, s.typical, s.largest) for s in shapes.values()]
    assert all(low <= mid <= high for r in ranges for low, mid, high in zip(*r, strict=True))


def test_a_static_cache_keeps_its_length_and_only_prefill_lets_the_prefix_in() -> None:
    prefill, decode = (p.shapes for p in make_profiles(STATIC_INPUTS, ["prefill", "decode"], limits()))
    # A prefix enters row by row.
    for shapes, batches in ((prefill, (1, 1, 1)), (decode, (1, 2, 4))):
        buffer, indices = shapes["past_key_values.0.key"], shapes["write_indices"]
        assert (buffer.smallest, buffer.typical, buffer.largest) == tuple((rows, 3, 105, 64) for rows in batches)
        assert (indices.smallest, indices.typical, indices.largest) == tuple((rows,) for rows in batches)
    assert {prefill["fresh"].smallest, prefill["fresh"].typical, prefill["fresh"].largest} == {(1,)}
    assert {decode["fresh"].smallest, decode["fresh"].typical, decode["fresh"].largest} == {(0,)}
    assert (prefill["input_ids"].largest, decode["input_ids"].largest) == ((1, 40), (4, 1))


def test_a_static_cache_without_a_prefix_is_filled_in_batches() -> None:
    inputs = [graph_input for graph_input in STATIC_INPUTS if graph_input.name != "fresh"]
    shapes = make_profiles(inputs, ["prefill"], limits(prefix=0, context=105))[0].shapes
    assert shapes["input_ids"].largest == (4, 40)
    assert shapes["past_key_values.0.key"].largest == (4, 3, 105, 64)


@pytest.mark.parametrize(
    ("graph_input", "named"),
    [
        (GraphInput("fresh", (None, None)), "'fresh'"),
        (GraphInput("write_slots", (None,)), "'write_slots'"),
        (GraphInput("past_key_values.0.key", (None, None, None, 64)), "'past_key_values.0.key'"),
    ],
)
def test_an_input_of_another_graph_is_refused(graph_input: GraphInput, named: str) -> None:
    with pytest.raises(EngineError) as caught:
        make_profiles([graph_input], ["decode"], limits())
    assert named in str(caught.value)


def test_the_defaults_follow_the_model() -> None:
    assert resolve_limits(BuildOptions(), 3, 8192) == Limits(BatchRange(), 2048, 256, 2048, 3)
    assert resolve_limits(BuildOptions(), 3, 128) == Limits(BatchRange(), 128, 128, 128, 3)
    assert resolve_limits(BuildOptions(max_prompt=64), 0, 128) == Limits(BatchRange(), 128, 64, 64, 0)


def test_a_static_cache_is_used_to_its_end() -> None:
    assert resolve_limits(BuildOptions(), 3, 8192, 4096) == Limits(BatchRange(), 4096, 256, 4096, 3)
    assert resolve_limits(BuildOptions(max_context=64), 3, 8192, 4096) == Limits(BatchRange(), 64, 64, 64, 3)
    with pytest.raises(EngineError, match="max_context is 101, but the bundle's static cache holds 100 tokens"):
        resolve_limits(BuildOptions(max_context=101), 3, 8192, 100)


def test_a_plan_may_have_less_capacity_than_its_bundle() -> None:
    small = resolve_limits(BuildOptions(capacity=64), 3, 8192, 100)
    assert small == Limits(BatchRange(), 64, 64, 64, 3, slots=67)
    for options, capacity, message in (
        (BuildOptions(capacity=101), 100, "capacity is 101; expected 2 to 100 tokens, the bundle's"),
        (BuildOptions(capacity=1), 100, "capacity is 1; expected 2 to 100"),
        (BuildOptions(capacity=64), None, "grows with the sequence"),
        (BuildOptions(capacity=64, max_context=65), 100, "the plan's static cache holds 64 tokens; .* --plan-capacity"),
    ):
        with pytest.raises(EngineError, match=message):
            resolve_limits(options, 3, 8192, capacity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 129}, "the model takes 128"),
        ({"max_context": 64, "max_prompt": 65}, "more than max_context"),
    ],
)
def test_sizes_beyond_the_model_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        resolve_limits(BuildOptions(**options), 0, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "trt"}, "unknown backend 'trt'"),
        ({"profiles": ()}, "each once"),
        ({"profiles": ("prefill", "prefill")}, "each once"),
        ({"profiles": ("chunked",)}, "unknown profile 'chunked'"),
        ({"max_context": 1}, "at least 2 tokens"),
        ({"typical_prompt": 0}, "typical_prompt is 0"),
        ({"max_prompt": 0}, "max_prompt is 0"),
        ({"optimization_level": 6}, "expected 0 to 5"),
        ({"capacity": 0}, "capacity is 0"),
        ({"split": True, "profiles": ("decode",)}, "not only decode"),
        ({"hardware_compatible": "all"}, "unknown hardware compatibility 'all'"),
    ],
)
def test_options_check_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize("batch", [(0, 1, 1), (2, 1, 4), (1, 4, 2)])
def test_a_batch_range_is_ordered(batch: tuple[int, int, int]) -> None:
    with pytest.raises(EngineError, match="smallest <= typical <= largest"):
        BatchRange(*batch)
