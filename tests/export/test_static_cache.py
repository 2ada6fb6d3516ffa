"""The graph with a static cache: its logits are transformers' and the dynamic graph's, and it writes in place."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, EngineError, RecipeError
from spike_export.artifacts.manifest import Manifest, load_manifest
from spike_export.artifacts.recipe import Dtype, Recipe
from spike_export.engines.onnx_runtime.sequences import DynamicSequences, StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession, open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support import graph_parity
from tests.support.tiny.models import TinyModel, input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 24
WINDOW = 6
PREFIXES: Sequence[tuple[int, ...]] = ((), (5,), (5, 1, 9))

# float32: 24 bits of mantissa, a few thousand additions on the way; measured are 1e-6 of the logits' scale.
TOLERANCE = 1e-5

models = pytest.mark.parametrize("window", [None, WINDOW], ids=["llama", "mistral"])
prefixes = pytest.mark.parametrize("prefix", PREFIXES, ids=["plain", "prefix-1", "prefix-3"])


def tokens(batch: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 99, (batch, length))


def recipe_of(model: TinyModel, prefix: tuple[int, ...], dtype: Dtype, *, int8: bool = False) -> Recipe:
    scales = input_scales(model, tokens(2, 16, seed=9))
    return tiny_recipe(model.checkpoint, scales, kept={} if int8 else dict.fromkeys(scales, dtype), prefix=prefix)


def opened(
    folder: Path,
    model: TinyModel,
    prefix: tuple[int, ...] = (),
    dtype: Dtype = "float32",
    *,
    capacity: int | None = CAPACITY,
    int8: bool = False,
) -> BundleSession:
    """A session over a bundle with a static cache, or with a dynamic one where there is no capacity."""
    cache = CacheOptions() if capacity is None else CacheOptions("static", capacity)
    options = ExportOptions(dtype, cache=cache)
    bundle = folder / f"{cache.kind}-{capacity}"
    export_bundle(model.checkpoint, recipe_of(model, prefix, dtype, int8=int8), options, bundle)
    return open_bundle(bundle, threads=1)


def static(session: BundleSession, batch: int) -> StaticSequences:
    sequences = session.begin(batch)
    assert isinstance(sequences, StaticSequences)
    return sequences


def contents(sequences: StaticSequences) -> list[NDArray[Any]]:
    return list(sequences.buffers)


def reference(model: TinyModel, ids: NDArray[np.int64], prefix: tuple[int, ...] = ()) -> NDArray[Any]:
    """transformers' logits of one row `ids` [tokens] after the prefix."""
    return graph_parity.reference_logits(model, ids[None], prefix)[0]


assert_close = partial(graph_parity.assert_close, tolerance=TOLERANCE)


@models
@prefixes
def test_prefill_chunks_and_decode_equal_transformers_and_the_dynamic_graph(
    tmp_path: Path, window: int | None, prefix: tuple[int, ...]
) -> None:
    model = tiny_llama(sliding_window=window)
    ids = tokens(2, CAPACITY)  # the last decode step fills the last slot
    sessions = [opened(tmp_path, model, prefix, capacity=capacity) for capacity in (CAPACITY, None)]
    expected = np.stack([reference(model, row, prefix) for row in ids])
    for chunks in [(CAPACITY,), (7, 1, 16), (1,) * CAPACITY]:
        results = []
        for session in sessions:
            sequences = session.begin(2)
            parts = np.split(ids, np.cumsum(chunks)[:-1], axis=1)
            results.append(np.concatenate([sequences.step(part) for part in parts], axis=1))
            assert sequences.lengths.tolist() == [CAPACITY, CAPACITY]
        assert_close(results[0], expected)
        assert_close(results[0], results[1])


@pytest.mark.parametrize("capacity", [CAPACITY, None], ids=["static", "dynamic"])
@models
@prefixes
def test_ragged_prefill_and_decode_equal_the_rows_alone(
    tmp_path: Path, window: int | None, prefix: tuple[int, ...], capacity: int | None
) -> None:
    model = tiny_llama(sliding_window=window)
    ids, prompts = tokens(3, 17), np.array([10, 1, 6])
    sequences = opened(tmp_path, model, prefix, capacity=capacity).begin(3)
    padded = ids[:, :10].copy()
    padded[np.arange(10)[None] >= prompts[:, None]] = 98
    first = sequences.step(padded, prompts)
    got = [[first[row, : prompts[row]]] for row in range(3)]
    for _ in range(7):
        logits = sequences.step(np.take_along_axis(ids, sequences.lengths[:, None], axis=1))
        for row in range(3):
            got[row].append(logits[row])
    assert sequences.lengths.tolist() == (prompts + 7).tolist()
    for row in range(3):
        assert_close(np.concatenate(got[row]), reference(model, ids[row, : prompts[row] + 7], prefix))


@models
@prefixes
def test_ragged_chunks_go_on_where_each_row_ended(tmp_path: Path, window: int | None, prefix: tuple[int, ...]) -> None:
    """Right padding of one chunk is overwritten by the next; a row may also stand still."""
    model = tiny_llama(sliding_window=window)
    ids = tokens(2, 20)
    sequences = static(opened(tmp_path, model, prefix), 2)
    got: list[list[NDArray[Any]]] = [[], []]
    for counts in ([5, 2], [3, 5], [0, 4], [5, 1], [1, 1]):
        chunk = np.full((2, max(counts)), 98)
        for row, count in enumerate(counts):
            start = sequences.lengths[row]
            chunk[row, :count] = ids[row, start : start + count]
        logits = sequences.step(chunk, np.array(counts))
        for row, count in enumerate(counts):
            got[row].append(logits[row, :count])
    assert sequences.lengths.tolist() == [14, 13]
    for row, length in enumerate(sequences.lengths):
        assert_close(np.concatenate(got[row]), reference(model, ids[row, :length], prefix))


@models
@prefixes
def test_a_new_sequence_takes_a_row_of_a_running_batch(
    tmp_path: Path, window: int | None, prefix: tuple[int, ...]
) -> None:
    model = tiny_llama(sliding_window=window)
    ids, new = tokens(2, 20), tokens(1, 12, seed=5)[0]
    sequences = static(opened(tmp_path, model, prefix), 2)
    sequences.step(ids[:, :15])
    before = [buffer.copy() for buffer in contents(sequences)]
    # The row is full of an earlier sequence, of which nothing may be seen.
    admitted = sequences.admit(1, new[:8])
    assert_close(admitted[0], reference(model, new[:8], prefix))
    written = len(prefix) + 8
    for old, buffer in zip(before, contents(sequences), strict=True):
        np.testing.assert_array_equal(buffer[0], old[0])
        np.testing.assert_array_equal(buffer[1, :, written:], old[1, :, written:])
        # The prefix was there already, and is written again with the same values.
        np.testing.assert_array_equal(buffer[1, :, : len(prefix)], old[1, :, : len(prefix)])
        assert (buffer[1, :, len(prefix) : written] != old[1, :, len(prefix) : written]).any(axis=-1).all()
    for step in range(4):
        logits = sequences.step(np.array([[ids[0, 15 + step]], [new[8 + step]]]))
        assert_close(logits[0], reference(model, ids[0, : 16 + step], prefix)[-1:])
        assert_close(logits[1], reference(model, new[: 9 + step], prefix)[-1:])


@prefixes
def test_rows_may_be_admitted_one_after_another_into_an_empty_batch(tmp_path: Path, prefix: tuple[int, ...]) -> None:
    model = tiny_llama()
    ids = tokens(2, 9)
    sequences = static(opened(tmp_path, model, prefix), 2)
    sequences.admit(1, ids[1, :4])
    # Row 0 waits: it is fed padding, and must not disturb the other.
    logits = sequences.step(np.array([[98], [ids[1, 4]]]), np.array([0, 1]))
    assert_close(logits[1], reference(model, ids[1, :5], prefix)[-1:])
    sequences.admit(0, ids[0, :8])
    logits = sequences.step(np.array([[ids[0, 8]], [ids[1, 5]]]))
    assert_close(logits[0], reference(model, ids[0], prefix)[-1:])
    assert_close(logits[1], reference(model, ids[1, :6], prefix)[-1:])
    sequences.release(0)
    assert sequences.lengths.tolist() == [0, 6]


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_of_steps_admissions_and_releases_equals_the_rows_alone(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    prefix, window = PREFIXES[seed % 3], (None, WINDOW)[seed % 2]
    model = tiny_llama(sliding_window=window)
    sequences = static(opened(tmp_path, model, prefix), 3)
    held: list[list[int]] = [[97], [97], [97]]
    sequences.step(np.full((3, 1), 97))
    for _ in range(14):
        row = int(random.integers(3))
        if random.random() < 0.3:
            held[row] = random.integers(0, 99, random.integers(1, 9)).tolist()
            assert_close(sequences.admit(row, np.array(held[row]))[0], reference(model, np.array(held[row]), prefix))
            continue
        length = int(random.integers(1, 5))
        for other in range(3):
            if len(held[other]) + length > CAPACITY:
                sequences.release(other)
                sequences.admit(other, np.array([96]))
                held[other] = [96]
        chunk, counts = random.integers(0, 99, (3, length)), random.integers(0, length + 1, 3)
        logits = sequences.step(chunk, counts)
        for other, count in enumerate(counts):
            held[other] += chunk[other, :count].tolist()
            if count:
                assert_close(logits[other, :count], reference(model, np.array(held[other]), prefix)[-count:])
        assert sequences.lengths.tolist() == [len(own) for own in held]


@prefixes
def test_a_call_writes_its_own_slots_of_the_callers_memory_and_nothing_else(
    tmp_path: Path, prefix: tuple[int, ...]
) -> None:
    model, p = tiny_llama(), len(prefix)
    sequences = static(opened(tmp_path, model, prefix), 2)
    addresses = [buffer.ctypes.data for buffer in sequences.buffers]
    for buffer in sequences.buffers:
        buffer[:] = 7.0
    for start, count, counts in ((0, 6, [6, 4]), (6, 1, [1, 1])):
        before = [buffer.copy() for buffer in contents(sequences)]
        begins = sequences.lengths.copy()
        sequences.step(tokens(2, count, seed=start), np.array(counts))
        for old, buffer in zip(before, contents(sequences), strict=True):
            changed = (buffer != old).any(axis=(1, 3))
            for row, begin in enumerate(begins):
                slots = set(range(p + begin, p + begin + count)) | (set(range(p)) if start == 0 else set())
                assert set(np.flatnonzero(changed[row])) == slots
    assert [buffer.ctypes.data for buffer in sequences.buffers] == addresses


def test_onnx_runtime_writes_into_the_ort_value_it_reads(tmp_path: Path) -> None:
    """The bare graph, as another caller would bind it: one OrtValue as past and present."""
    import onnxruntime as ort

    model, prefix = tiny_llama(), PREFIXES[-1]
    session = opened(tmp_path, model, prefix)
    ids, binding = tokens(1, 5), session.session.io_binding()
    binding.bind_cpu_input("input_ids", ids)
    binding.bind_cpu_input("write_indices", np.zeros(1, np.int64))
    binding.bind_cpu_input("fresh", np.zeros(1, np.bool_))  # its value is not read
    binding.bind_output("logits")
    values = {}
    for value in session.session.get_inputs()[3:]:
        values[value.name] = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, *value.shape[1:]), np.float32))
        binding.bind_ortvalue_input(value.name, values[value.name])
        binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), values[value.name])
    addresses = [value.data_ptr() for value in values.values()]
    session.session.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    assert [output.data_ptr() for output in outputs[1:]] == addresses
    assert_close(outputs[0].numpy()[0], reference(model, ids[0], prefix))
    for value in values.values():
        filled = value.numpy()[0].any(axis=(0, 2))
        assert filled.tolist() == [slot < len(prefix) + 5 for slot in range(len(prefix) + CAPACITY)]


@prefixes
def test_int8_logits_are_the_dynamic_graphs(tmp_path: Path, prefix: tuple[int, ...]) -> None:
    model = tiny_llama(sliding_window=WINDOW)
    ids = tokens(2, 12)
    results = []
    for capacity in (CAPACITY, None):
        sequences = opened(tmp_path, model, prefix, capacity=capacity, int8=True).begin(2)
        results.append(np.concatenate([sequences.step(ids[:, :9]), sequences.step(ids[:, 9:])], axis=1))
    # A rounding that falls to the other side would show as 1e-3.
    assert_close(results[0], results[1])


def test_float16_is_close_to_float32(tmp_path: Path) -> None:
    model, prefix = tiny_llama(), PREFIXES[-1]
    ids = tokens(2, 19)
    sequences = opened(tmp_path, model, prefix, "float16").begin(2)
    actual = np.concatenate([sequences.step(part) for part in np.split(ids, [7, 8], axis=1)], axis=1)
    expected = np.stack([reference(model, row, prefix) for row in ids])
    # 11 bits of mantissa: 5e-4 per rounding, a few dozen roundings on the way.
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 5e-3 * np.sqrt(np.mean(expected**2))


@prefixes
def test_prefill_of_a_check_is_the_dynamic_bundles(tmp_path: Path, prefix: tuple[int, ...]) -> None:
    model = tiny_llama()
    content = tokens(2, CAPACITY - 1)  # BOS is fed before it where the prefix holds none
    results = [opened(tmp_path, model, prefix, capacity=capacity).prefill(content) for capacity in (CAPACITY, None)]
    assert_close(results[0], results[1])


@pytest.mark.parametrize(("before", "more"), [(0, CAPACITY + 1), (CAPACITY, 1), (CAPACITY - 2, 3)])
def test_tokens_beyond_the_capacity_are_refused_before_onnx_runtime_sees_them(
    tmp_path: Path, before: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = static(opened(tmp_path, tiny_llama()), 2)
    if before:
        sequences.step(tokens(2, before), np.array([1, before]))
    kept = [buffer.copy() for buffer in contents(sequences)]
    monkeypatch.setattr(sequences.session, "run_with_iobinding", None)
    with pytest.raises(EngineError, match=rf"row \d has {before} tokens and {more} more do not fit .* of {CAPACITY}"):
        sequences.step(tokens(2, more))
    with pytest.raises(EngineError, match=rf"row 1 has 0 tokens and {CAPACITY + 1} more do not fit"):
        sequences.admit(1, tokens(1, CAPACITY + 1)[0])
    assert sequences.lengths.max() == before
    for old, buffer in zip(kept, contents(sequences), strict=True):
        np.testing.assert_array_equal(buffer, old)


def test_a_refused_call_leaves_the_batch_as_it_was(tmp_path: Path) -> None:
    model, prefix = tiny_llama(), PREFIXES[-1]
    ids = tokens(2, 6)
    sequences = static(opened(tmp_path, model, prefix), 2)
    refused = [(0, tokens(1, CAPACITY + 1)[0]), (2, ids[0]), (-1, ids[0]), (0, ids[0, :0])]
    for row, new in refused:
        with pytest.raises(EngineError):
            sequences.admit(row, new)
    # Still not begun: the first step brings the prefix.
    assert_close(sequences.step(ids)[1], reference(model, ids[1], prefix))
    # A released row keeps the prefix, and begins anew with the next tokens.
    sequences.release(0)
    assert_close(sequences.step(ids[:, :2])[0], reference(model, ids[0, :2], prefix))


@pytest.mark.parametrize(
    ("shape", "counts", "said"),
    [
        ((3, 4), None, "tokens of shape [3, 4]"),
        ((2, 0), None, "tokens of shape [2, 0]"),
        ((2, 4), [5, 1], "from 0 to 4"),
        ((2, 4), [-1, 1], "from 0 to 4"),
        ((2, 4), [1], "expected 2 numbers"),
    ],
)
@pytest.mark.parametrize("capacity", [CAPACITY, None], ids=["static", "dynamic"])
def test_what_is_not_of_the_batch_is_refused(
    tmp_path: Path, capacity: int | None, shape: tuple[int, int], counts: list[int] | None, said: str
) -> None:
    sequences = opened(tmp_path, tiny_llama(layers=1), capacity=capacity).begin(2)
    with pytest.raises(EngineError) as refusal:
        sequences.step(np.zeros(shape, np.int64), None if counts is None else np.array(counts))
    assert said in str(refusal.value)


def test_a_dynamic_cache_refuses_ragged_chunks_that_a_sliding_window_would_miscount(tmp_path: Path) -> None:
    sequences = opened(tmp_path, tiny_llama(sliding_window=WINDOW), capacity=None).begin(2)
    assert isinstance(sequences, DynamicSequences)
    sequences.step(tokens(2, 5), np.array([5, 3]))
    with pytest.raises(EngineError, match="sliding window; use --kv-cache static"):
        sequences.step(tokens(2, 2), np.array([2, 1]))


def graph_of(bundle: Path) -> onnx.GraphProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False).graph


def shapes(values: Any) -> Mapping[str, list[Any]]:
    return {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in values
    }


@prefixes
def test_the_interface_and_the_manifest_say_what_the_buffer_holds(tmp_path: Path, prefix: tuple[int, ...]) -> None:
    manifest = opened(tmp_path, tiny_llama(layers=1), prefix).manifest
    bundle, slots = tmp_path / f"static-{CAPACITY}", len(prefix) + CAPACITY
    assert (manifest.kv_cache, manifest.capacity, manifest.cache_slots) == ("static", CAPACITY, slots)
    graph = graph_of(bundle)
    buffer = ["batch", 2, slots, 16]
    fresh = {"fresh": ["fresh"]} if prefix else {}
    assert shapes(graph.input) == {
        "input_ids": ["batch", "sequence"],
        "write_indices": ["batch"],
        **fresh,
        "past_key_values.0.key": buffer,
        "past_key_values.0.value": buffer,
    }
    presents = {"present.0.key": buffer, "present.0.value": buffer}
    assert shapes(graph.output) == {"logits": ["batch", "sequence", 99], **presents}
    assert [info.name for info in manifest.inputs] == [value.name for value in graph.input]
    # One per buffer, whose result is the graph's output: TensorRT aliases no other.
    scatters = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert {node.output[0] for node in scatters} == set(presents)
    # No onnxruntime-genai drives this graph.
    assert not (bundle / "genai_config.json").exists()


def test_a_graph_without_a_prefix_has_no_trace_of_one(tmp_path: Path) -> None:
    opened(tmp_path, tiny_llama(layers=1))
    graph = graph_of(tmp_path / f"static-{CAPACITY}")
    assert not [node.name for node in graph.node if "prefix" in node.name or node.op_type in ("Expand", "Concat")]


def test_layers_of_both_graphs_have_the_same_node_names_but_for_the_cache(tmp_path: Path) -> None:
    model, names = tiny_llama(), []
    for capacity in (CAPACITY, None):
        session = opened(tmp_path, model, PREFIXES[-1], capacity=capacity)
        graph = graph_of(tmp_path / f"{session.manifest.kv_cache}-{capacity}")
        names.append({node.name for node in graph.node if node.name.startswith(("model.layers", "lm_head"))})
    assert {name.rsplit(".", 1)[1] for name in names[0] ^ names[1]} == {"update_key", "update_value"}


@pytest.mark.parametrize(
    ("kind", "capacity", "said"),
    [
        ("static", None, "--kv-cache static needs --capacity N"),
        ("dynamic", 8, "--capacity 8 needs a static cache"),
        ("static", 0, "--capacity is 0; expected at least 1"),
        ("static", -3, "--capacity is -3; expected at least 1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(kind: Any, capacity: int | None, said: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        CacheOptions(kind, capacity)
    assert said in str(refusal.value)


def test_the_capacity_ends_where_the_model_does(tmp_path: Path) -> None:
    model = tiny_llama(layers=1, max_positions=CAPACITY)
    ids, prefix = tokens(1, CAPACITY), PREFIXES[-1]
    # The prefix is not counted, and takes no position from the caller.
    assert_close(opened(tmp_path, model, prefix).begin(1).step(ids)[0], reference(model, ids[0], prefix))
    with pytest.raises(
        RecipeError, match=f"--capacity is {CAPACITY + 1}, but the model takes {CAPACITY} tokens at most"
    ):
        opened(tmp_path, model, prefix, capacity=CAPACITY + 1)


@pytest.mark.parametrize(
    "change", [{"capacity": None}, {"kv_cache": "dynamic"}, {"cache_slots": CAPACITY}, {"capacity": 0}]
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, change: Mapping[str, Any]) -> None:
    manifest = opened(tmp_path, tiny_llama(layers=1), PREFIXES[-1]).manifest
    bundle = tmp_path / f"static-{CAPACITY}"
    assert load_manifest(bundle) == manifest
    changed = Manifest.model_construct(**{**dict(manifest), **change})
    (bundle / "manifest.json").write_text(changed.model_dump_json(warnings=False))
    with pytest.raises(ArtifactError, match="export the bundle again"):
        load_manifest(bundle)
