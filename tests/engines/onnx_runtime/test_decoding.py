"""Decoding in ONNX Runtime: the tokens are transformers', whatever else is in the batch and however long it gets."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import GRAPH_FILE, LogitsScope, load_manifest
from spike_export.engines.generation.decoding import DecodedStep
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.onnx_runtime import prefill_chunk, sequences
from spike_export.engines.onnx_runtime.decoding import OnnxDecoding
from spike_export.engines.onnx_runtime.generation_graph import generation_graph
from spike_export.engines.onnx_runtime.sequences import LOWERED_BUCKETS, StaticSequences
from spike_export.engines.onnx_runtime.session import open_bundle, open_for_generation
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.graph_parity import PARITY, assert_close, reference_logits
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY, BUCKET, CHUNK, PREFIX = 48, 8, 7, (5, 1, 9)

GREEDY = GenerationOptions(max_new_tokens=10)


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Iterator[None]:
    """Buffers that grow, and prompts that are cut, within a few tokens."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sequences, "BUCKET", BUCKET)
    patch.setattr(prefill_chunk, "LARGEST", CHUNK)
    yield
    patch.undo()


@pytest.fixture(scope="module", params=[None, 20], ids=["llama", "mistral"])
def model(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_llama(sliding_window=request.param, max_positions=CAPACITY)


def exported(
    model: TinyModel,
    folder: Path,
    capacity: int | None,
    prefix: tuple[int, ...] = PREFIX,
    logits: LogitsScope = "all",
) -> Path:
    recipe = unquantized_recipe(model.checkpoint, prefix) if prefix else None
    cache = CacheOptions() if capacity is None else CacheOptions("static", capacity)
    bundle = folder / f"{cache.kind}-{len(prefix)}-{logits}"
    export_bundle(model.checkpoint, recipe, ExportOptions("float32", cache=cache, logits=logits), bundle)
    return bundle


@pytest.fixture(scope="module", params=[None, CAPACITY], ids=["dynamic", "static"])
def decoding(request: pytest.FixtureRequest, model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return OnnxDecoding(open_for_generation(exported(model, tmp_path_factory.mktemp("b"), request.param), threads=1))


@pytest.fixture(scope="module")
def static(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoding:
    return OnnxDecoding(open_for_generation(exported(model, tmp_path_factory.mktemp("s"), CAPACITY), threads=1))


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 99, length) for length in lengths]


def drawn(steps: Iterator[DecodedStep]) -> list[list[int]]:
    rows: list[list[int]] = np.stack([step.tokens for step in steps], axis=1).tolist()
    return rows


def reference_tokens(model: TinyModel, prompt: NDArray[np.int64], count: int, prefix: tuple[int, ...]) -> list[int]:
    """The most probable tokens by transformers' model."""
    ids = prompt
    for _ in range(count):
        ids = np.append(ids, reference_logits(model, ids[None], prefix)[0, -1].argmax())
    result: list[int] = ids[len(prompt) :].tolist()
    return result


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
@pytest.mark.parametrize("capacity", [None, CAPACITY], ids=["dynamic", "static"])
def test_greedy_tokens_are_transformers(
    model: TinyModel, tmp_path: Path, capacity: int | None, prefix: tuple[int, ...], logits: LogitsScope
) -> None:
    decoding = OnnxDecoding(open_for_generation(exported(model, tmp_path, capacity, prefix, logits), threads=1))
    prompts = prompts_of((1, 17, 6))
    assert drawn(decoding.decode(prompts, GREEDY)) == [
        reference_tokens(model, prompt, GREEDY.max_new_tokens, prefix) for prompt in prompts
    ]


# Derandomized: two logits that differ by less than the products' rounding would tell batches apart by chance.
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 2**20),
    fields=st.sampled_from(
        [{}, {"do_sample": True, "seed": 7, "top_p": 0.9}, {"repetition_penalty": 1.4}, {"logprobs": 2}]
    ),
)
def test_rows_are_as_they_are_alone(
    decoding: OnnxDecoding, lengths: list[int], seed: int, fields: dict[str, Any]
) -> None:
    options = replace(GREEDY, **fields)
    prompts = prompts_of(lengths, seed)
    together = drawn(decoding.decode(prompts, options))
    for row, prompt in enumerate(prompts):
        own = options if options.seed is None else replace(options, seed=options.seed + row)
        assert drawn(decoding.decode([prompt], own))[0] == together[row]


@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_sequences_that_come_and_go_are_as_they_are_alone(static: OnnxDecoding, data: st.DataObject) -> None:
    """Rows of a static cache are given to new sequences while others go on; buffers grow on the way."""
    batch = static.session.begin(3)
    assert isinstance(batch, StaticSequences)
    held: dict[int, list[int]] = {}
    latest = np.zeros(3, np.int64)
    finished: list[tuple[int, list[int]]] = []
    begun: dict[int, int] = {}
    for step in range(data.draw(st.integers(5, 14))):
        for row in range(3):
            if row in held and data.draw(st.booleans()) and len(held[row]) > 25:
                finished.append((begun.pop(row), held.pop(row)))
                batch.release(row)
            elif row not in held and data.draw(st.booleans()):
                prompt = prompts_of([data.draw(st.integers(1, 20))], seed=step + 10 * row)[0]
                begun[row], held[row] = len(prompt), prompt.tolist()
                latest[row] = batch.admit(row, prompt)[0, -1].argmax()
                held[row].append(int(latest[row]))
        if not held:
            continue
        logits = batch.step(latest[:, None])
        for row in range(3):
            if row in held:
                latest[row] = logits[row, -1].argmax()
                held[row].append(int(latest[row]))
            else:
                batch.release(row)
    finished += [(begun[row], tokens) for row, tokens in held.items()]
    for start, tokens in finished:
        options = replace(GREEDY, max_new_tokens=len(tokens) - start)
        assert drawn(static.decode([np.array(tokens[:start])], options))[0] == tokens[start:]


@pytest.mark.parametrize("lowering", [False, True])
def test_buffers_are_as_long_as_the_longest_row_needs(model: TinyModel, tmp_path: Path, lowering: bool) -> None:
    batch = open_for_generation(exported(model, tmp_path, CAPACITY), threads=1, lowering=lowering).begin(2)
    assert isinstance(batch, StaticSequences)
    lowered = lowering and batch.manifest.sliding_window is None
    bucket = BUCKET * LOWERED_BUCKETS if lowered else BUCKET
    ids = prompts_of((30, 30))
    seen = []
    for row in range(2):
        batch.admit(row, ids[row][:3])
    logits = []
    for step in range(3, 30):
        logits.append(batch.step(np.array([[ids[0][step]], [ids[1][step]]])))
        seen.append(batch.buffers[0].shape[2])
        assert {buffer.shape[2] for buffer in batch.buffers} == {seen[-1]}
    assert seen == [len(PREFIX) + -(-length // bucket) * bucket for length in range(4, 31)]
    for row in range(2):
        assert_close(np.concatenate(logits, axis=1)[row], reference_logits(model, ids[row][None], PREFIX)[0, 3:])


def test_the_last_bucket_ends_with_the_capacity(model: TinyModel, tmp_path: Path) -> None:
    capacity = 2 * BUCKET + 3
    batch = open_for_generation(exported(model, tmp_path, capacity), threads=1).begin(1)
    assert isinstance(batch, StaticSequences)
    batch.step(prompts_of((capacity,))[0][None])
    assert batch.buffers[0].shape[2] == len(PREFIX) + capacity
    with pytest.raises(EngineError, match="row 0 has 19 tokens and 1 more do not fit into the cache's capacity of 19"):
        batch.step(np.zeros((1, 1), np.int64))


def test_a_static_cache_is_written_in_place_between_two_buckets(model: TinyModel, tmp_path: Path) -> None:
    """Each call changes the slots that it writes, in the memory it was given, and allocates no cache."""
    batch = open_for_generation(exported(model, tmp_path, CAPACITY), threads=1).begin(1)
    assert isinstance(batch, StaticSequences)
    batch.admit(0, prompts_of((BUCKET + 1,))[0])
    addresses = [buffer.ctypes.data for buffer in batch.buffers]
    for step in range(BUCKET - 1):
        before = [buffer.copy() for buffer in batch.buffers]
        batch.step(np.array([[step]]))
        for old, new in zip(before, batch.buffers, strict=True):
            changed = (old != new).any(axis=(1, 3))[0]
            assert np.flatnonzero(changed).tolist() == [len(PREFIX) + BUCKET + 1 + step]
    assert [buffer.ctypes.data for buffer in batch.buffers] == addresses


def test_a_buffer_that_is_not_in_place_would_be_noticed(model: TinyModel, tmp_path: Path) -> None:
    """The control of the test above: a second buffer as the output leaves the first one as it was."""
    batch = open_for_generation(exported(model, tmp_path, CAPACITY), threads=1).begin(1)
    assert isinstance(batch, StaticSequences)
    batch.admit(0, prompts_of((3,))[0])
    other, first = np.zeros_like(batch.buffers[0]), batch.buffers[0].copy()
    binding = batch._binding(slice(0, 1))
    binding.bind_output("present.0.key", "cpu", 0, np.float32, list(other.shape), other.ctypes.data)
    batch.step(np.array([[1]]))
    assert np.array_equal(batch.buffers[0], first)
    assert not np.array_equal(other, first)


@pytest.mark.parametrize("capacity", [None, CAPACITY], ids=["dynamic", "static"])
def test_the_graph_of_generation_computes_the_bundles_last_logits(
    model: TinyModel, tmp_path: Path, capacity: int | None
) -> None:
    bundle = exported(model, tmp_path, capacity)
    before = (bundle / GRAPH_FILE).read_bytes()
    ids = np.stack(prompts_of((9, 9, 9)))
    shipped = open_bundle(bundle, threads=1).begin(3).step(ids)
    generating = open_for_generation(bundle, threads=1).begin(3).step(ids)
    assert generating.shape == (3, 1, 99)
    assert_close(generating, shipped[:, -1:], PARITY)
    assert (bundle / GRAPH_FILE).read_bytes() == before


def test_a_graph_without_the_place_to_cut_keeps_its_logits(model: TinyModel, tmp_path: Path) -> None:
    """As one changed by hand; ragged prompts then find their own last logits among all."""
    bundle = exported(model, tmp_path, None, ())
    proto = onnx.load(bundle / GRAPH_FILE, load_external_data=False)
    for node in proto.graph.node:
        node.name = node.name.replace("attention_residual", "sum")
    onnx.save(proto, bundle / GRAPH_FILE)
    graph = generation_graph(bundle, load_manifest(bundle), lowering=False)
    assert onnx.load_from_string(graph.serialized) == proto
    prompts = prompts_of((4, 11))
    decoding = OnnxDecoding(open_for_generation(bundle, threads=1))
    assert drawn(decoding.decode(prompts, GREEDY)) == [reference_tokens(model, each, 10, ()) for each in prompts]


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_damaged_graph_is_one_line(model: TinyModel, tmp_path: Path, content: bytes | None) -> None:
    bundle = exported(model, tmp_path, CAPACITY, logits="last")
    graph = bundle / GRAPH_FILE
    graph.write_bytes(graph.read_bytes()[:-100] if content is None else content)
    for opened in (open_for_generation, partial(open_bundle, all_logits=True)):
        with pytest.raises(EngineError, match=r"model\.onnx: .*export the bundle again") as refusal:
            opened(bundle, threads=1)
        assert "\n" not in str(refusal.value)


def test_logprobs_are_those_of_transformers(model: TinyModel, tmp_path: Path) -> None:
    decoding = OnnxDecoding(open_for_generation(exported(model, tmp_path, None), threads=1))
    (prompt,) = prompts_of((12,))
    (step,) = decoding.decode([prompt], GenerationOptions(max_new_tokens=1, logprobs=4, temperature=3.0))
    expected = torch.from_numpy(reference_logits(model, prompt[None], PREFIX)[0, -1]).log_softmax(-1)
    best = expected.topk(4)
    assert step.logprobs is not None
    assert step.top_tokens is not None
    assert step.top_tokens[0].tolist() == best.indices.tolist()
    # A rounding of the logits by PARITY of their scale moves a log-probability by at most twice that.
    bound = 2 * PARITY * float(np.abs(reference_logits(model, prompt[None], PREFIX)).max())
    np.testing.assert_allclose(step.top_logprobs[0], best.values, rtol=0, atol=bound)
    np.testing.assert_allclose(step.logprobs[0], best.values[0], rtol=0, atol=bound)


def test_one_bundle_opened_twice_is_one_session(model: TinyModel, tmp_path: Path) -> None:
    bundle = exported(model, tmp_path, CAPACITY)
    first, second = (open_for_generation(bundle, threads=1) for _ in range(2))
    assert first.session is second.session
    assert open_for_generation(bundle, threads=2).session is not first.session
    prompts = prompts_of((5, 3))
    one, other = (OnnxDecoding(session).decode(prompts, GREEDY) for session in (first, second))
    interleaved = [(a.tokens.tolist(), b.tokens.tolist()) for a, b in zip(one, other, strict=True)]
    assert all(a == b for a, b in interleaved)
    session = weakref.ref(first.session)
    del first, second, one, other
    gc.collect()
    assert session() is None


@pytest.mark.parametrize(
    ("lengths", "count", "message"),
    [
        (
            (3, CAPACITY - 4),
            6,
            f"prompt 1 has 44 tokens and max_new_tokens is 6, but .* {CAPACITY}; ask for at most 5 ",
        ),
        ((CAPACITY + 1,), 1, f"prompt 0 has 49 tokens, and a sequence has room for {CAPACITY}; shorten it"),
        ((2, 0), 1, "prompt 1 has no tokens; give at least one"),
        ((), 1, "there is no prompt; give at least one"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    decoding: OnnxDecoding, lengths: tuple[int, ...], count: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        decoding.decode(prompts_of(lengths), GenerationOptions(max_new_tokens=count))


def test_the_whole_context_can_be_used(decoding: OnnxDecoding, model: TinyModel) -> None:
    (prompt,) = prompts_of((CAPACITY - 4,))
    tokens = drawn(decoding.decode([prompt], GenerationOptions(max_new_tokens=5)))[0]
    assert tokens == reference_tokens(model, prompt, 5, PREFIX)


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = tiny_llama()
    model.checkpoint.tensors.read("model.norm.weight")[:] = 3e38  # finite itself, and its products are not
    decoding = OnnxDecoding(open_for_generation(exported(model, tmp_path, None, ()), threads=1))
    with pytest.raises(EngineError, match=r"row 0: the logits are not finite, .* --dtype float32"):
        list(decoding.decode(prompts_of((3,)), GREEDY))


def test_a_cache_that_cannot_be_made_is_one_error(model: TinyModel, tmp_path: Path) -> None:
    session = open_for_generation(exported(model, tmp_path, CAPACITY), threads=1)
    with pytest.raises(EngineError, match=r"no room for \d+ bytes of .* on cpu .*; give fewer or shorter sequences$"):
        session.begin(10**14)
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"on cuda .*, or use the provider cpu: .* a torch with CUDA$"):
            replace(session, provider="cuda").begin(1)


def test_a_provider_that_is_not_there_is_refused(model: TinyModel, tmp_path: Path) -> None:
    import onnxruntime as ort

    bundle = exported(model, tmp_path, None)
    with pytest.raises(EngineError, match="provider 'npu' is not known; expected one of cpu, cuda"):
        open_for_generation(bundle, provider="npu")  # type: ignore[arg-type]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(EngineError, match="has no CUDAExecutionProvider; install the extra `gpu`"):
            open_for_generation(bundle, provider="cuda")


def test_a_provider_that_does_not_start_is_no_silent_cpu(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxruntime-gpu where no CUDA library can be loaded: it warns, and takes the CPU."""
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    plain = ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda graph, options, providers, **more: plain(graph, options, providers[1:], **more)
    )
    with pytest.raises(EngineError, match="could not start its CUDAExecutionProvider"):
        open_for_generation(exported(model, tmp_path, None), provider="cuda")
