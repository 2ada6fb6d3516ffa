"""A lowered graph computes what the bundle's own does, however it is fed, and a layer that would not is left alone."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import AttentionPlan
from spike_export.engines.onnx_runtime import sequences
from spike_export.engines.onnx_runtime.generation_graph import generation_graph
from spike_export.engines.onnx_runtime.lowering.grouped_query_attention import OPERATOR, lower_attention
from spike_export.engines.onnx_runtime.sequences import StaticSequences
from spike_export.engines.onnx_runtime.session import open_for_generation
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.graph_parity import assert_close
from tests.support.tiny.families import NAMES, tiny_family
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import TinyModel, tiny_llama, unquantized_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY, PREFIX, ROWS = 40, (5, 1, 9), 3

LOWERED = {
    "llama": 4,
    "gemma": 4,
    "gemma3_text": 2,  # every other layer has a sliding window
    "granite": 4,
    "olmo2": 4,
    "qwen2": 2,  # the layers from the third on have a sliding window
    "qwen3": 4,
    "qwen3_moe": 4,
    "mistral": 0,
    "mixtral": 0,
    "gemma2": 0,  # scores are capped
    "phi3": 0,
}
"""Family → layers of four whose attention is lowered."""


@pytest.fixture(autouse=True, scope="module")
def small_steps() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(sequences, "BUCKET", 8)
    yield
    patch.undo()


def exported(model: TinyModel, bundle: Path, prefix: tuple[int, ...] = PREFIX, capacity: int = CAPACITY) -> Path:
    recipe = unquantized_recipe(model.checkpoint, prefix) if prefix else None
    options = ExportOptions("float32", cache=CacheOptions("static", capacity), logits="last")
    export_bundle(model.checkpoint, recipe, options, bundle)
    return bundle


def operators(bundle: Path, *, lowering: bool = True) -> Counter[str]:
    graph = generation_graph(bundle, load_manifest(bundle), lowering=lowering).serialized
    return Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)


def begun(bundle: Path, *, lowering: bool) -> StaticSequences:
    opened = open_for_generation(bundle, threads=1, lowering=lowering).begin(ROWS)
    assert isinstance(opened, StaticSequences)
    return opened


def wide(name: str) -> TinyModel:
    """Return a family whose heads have 16 channels, which the operator takes."""
    return tiny_family(name, hidden_size=64, head_dim=16)


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
@pytest.mark.parametrize("name", NAMES)
def test_every_family_computes_the_same(name: str, prefix: tuple[int, ...], tmp_path: Path) -> None:
    bundle = exported(wide(name), tmp_path / "bundle", prefix)
    counted = operators(bundle)
    assert (counted[OPERATOR], counted["Attention"]) == (
        LOWERED[name],
        operators(bundle, lowering=False)["Attention"] - LOWERED[name],
    )
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 99, length) for length in (1, 19, 6)]
    steps = random.integers(0, 99, (4, ROWS, 1))
    logits = []
    for lowering in (True, False):
        batch = begun(bundle, lowering=lowering)
        rows = [batch.admit(row, prompt[:11]) for row, prompt in enumerate(prompts)]
        rows[1] = batch.extend(1, prompts[1][11:])
        logits.append(np.concatenate([*rows, *(batch.step(tokens) for tokens in steps)]))
    assert_close(*logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "qwen3"])
def test_a_cache_in_int8_is_read_as_the_standard_operators_read_it(name: str, tmp_path: Path) -> None:
    """To a part of what INT8 itself changes: a key between two steps may be rounded to either."""
    model = wide(name)
    recipe = with_kv_cache(unquantized_recipe(model.checkpoint, PREFIX), model.checkpoint, np.arange(20)[None])
    logits = {}
    for dtype, lowering in (("int8", True), ("int8", False), ("unquantized", True)):
        options = ExportOptions(
            "float32",
            cache=CacheOptions("static", CAPACITY),
            logits="last",
            kv_cache_dtype="int8" if dtype == "int8" else "unquantized",
        )
        export_bundle(model.checkpoint, recipe, options, tmp_path / "bundle")
        if lowering:
            assert operators(tmp_path / "bundle")[OPERATOR] == LOWERED[name]
        batch, random = begun(tmp_path / "bundle", lowering=lowering), np.random.default_rng(0)
        rows = [batch.admit(row, random.integers(0, 99, length)) for row, length in enumerate((1, 19, 6))]
        rows += [batch.step(random.integers(0, 99, (ROWS, 1))) for _ in range(3)]
        logits[dtype, lowering] = np.concatenate([each.reshape(-1, each.shape[-1]) for each in rows])
    effect = np.abs(logits["int8", True] - logits["unquantized", True]).max()
    assert effect > 1e-3
    assert np.abs(logits["int8", True] - logits["int8", False]).max() < effect / 20


def test_a_lowered_cache_in_int8_begins_with_the_prefix_in_steps(tmp_path: Path) -> None:
    model = tiny_llama(max_positions=CAPACITY)
    recipe = with_kv_cache(unquantized_recipe(model.checkpoint, PREFIX), model.checkpoint, np.arange(20)[None])
    options = ExportOptions("float32", cache=CacheOptions("static", CAPACITY), logits="last")
    export_bundle(model.checkpoint, recipe, options, tmp_path / "bundle")
    graph = generation_graph(tmp_path / "bundle", load_manifest(tmp_path / "bundle"))
    assert graph.prefix is not None
    assert {values.dtype for values in graph.prefix.values()} == {np.dtype(np.int8)}
    batch = begun(tmp_path / "bundle", lowering=True)
    assert {buffer.dtype for buffer in batch.buffers} == {np.dtype(np.int8)}


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("lowering") / "int8", tiny_llama(max_positions=CAPACITY)
    recipe = with_kv_cache(unquantized_recipe(model.checkpoint, PREFIX), model.checkpoint, np.arange(20)[None])
    export_bundle(model.checkpoint, recipe, ExportOptions("float32", cache=CacheOptions("static", CAPACITY)), folder)
    return folder


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("query_restored", "Add"),
        ("mixed_restored", "Add"),
        ("key_in_steps", "Mul"),
        ("value_QuantizeLinear", "Identity"),
        ("cached_key_DequantizeLinear", "Identity"),
    ],
)
def test_a_layer_whose_int8_cache_was_changed_by_hand_is_left(int8_bundle: Path, name: str, operator: str) -> None:
    manifest = load_manifest(int8_bundle)
    model = onnx.load_from_string(generation_graph(int8_bundle, manifest, lowering=False).serialized)
    next(node for node in model.graph.node if node.name == f"model.layers.0.self_attn.{name}").op_type = operator
    lower_attention(model)
    assert Counter(node.op_type for node in model.graph.node)[OPERATOR] == manifest.num_hidden_layers - 1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_llama(max_positions=CAPACITY), tmp_path_factory.mktemp("lowering") / "bundle")


Call = tuple[str, int, int]
"""What is done, to which row, with how many tokens."""

CALLS: st.SearchStrategy[list[Call]] = st.lists(
    st.tuples(
        st.sampled_from(["admit", "extend", "step", "first", "move"]), st.integers(0, ROWS - 1), st.integers(1, 9)
    ),
    min_size=1,
    max_size=12,
)


def played(batch: StaticSequences, calls: list[Call]) -> list[NDArray[np.float32]]:
    """Do what fits into the cache; return all logits of rows that hold a sequence."""
    random, found = np.random.default_rng(1), []
    admitted: set[int] = set()
    for kind, row, count in calls:
        tokens = random.integers(0, 99, (ROWS, count))
        room = CAPACITY - int(batch.lengths.max())
        if kind == "admit":
            found.append(batch.admit(row, tokens[0]))
            admitted.add(row)
        elif kind == "move" and row in admitted and row:
            batch.move(row, 0)
            admitted = admitted - {row} | {0}
        elif kind == "extend" and row in admitted and count <= room:
            found.append(batch.extend(row, tokens[0]))
        elif kind == "first" and set(range(row + 1)) <= admitted and room:
            found.append(batch.step_first(tokens[: row + 1, :1], np.ones(row + 1, np.int64)))
        elif kind == "step" and len(admitted) == ROWS and count <= room:
            found.append(batch.step(tokens))
    return found


@settings(max_examples=40, deadline=None)
@given(CALLS)
def test_rows_that_come_and_go_compute_the_same(bundle: Path, calls: list[Call]) -> None:
    lowered, standard = (played(begun(bundle, lowering=lowering), calls) for lowering in (True, False))
    assert len(lowered) == len(standard)
    for each, expected in zip(lowered, standard, strict=True):
        assert_close(each, expected)


def test_half_precision(tmp_path: Path) -> None:
    """Both round to float16 behind every node: eight roundings of 2^-11 each are far above what is seen, two."""
    model, folder = tiny_llama(max_positions=CAPACITY), tmp_path / "bundle"
    options = ExportOptions("float16", cache=CacheOptions("static", CAPACITY), logits="last")
    export_bundle(model.checkpoint, unquantized_recipe(model.checkpoint, PREFIX, "float16"), options, folder)
    assert operators(folder)[OPERATOR] == model.checkpoint.config.num_hidden_layers
    calls: list[Call] = [("admit", 0, 9), ("admit", 1, 4), ("admit", 2, 1), ("step", 0, 1), ("extend", 1, 5)]
    lowered, standard = (played(begun(folder, lowering=lowering), calls) for lowering in (True, False))
    for each, expected in zip(lowered, standard, strict=True):
        assert_close(each.astype(np.float32), expected.astype(np.float32), tolerance=8 * 2**-11)


def test_rows_begin_together(bundle: Path) -> None:
    """Several tokens of several rows: the operator takes them row by row only."""
    tokens = np.random.default_rng(2).integers(0, 99, (ROWS, 13))
    lowered, standard = (begun(bundle, lowering=lowering) for lowering in (True, False))
    assert_close(lowered.step(tokens), standard.step(tokens))
    assert_close(lowered.step(tokens[:, :5]), standard.step(tokens[:, :5]))


def test_the_prefix_is_no_longer_the_graph_s(bundle: Path) -> None:
    graph = generation_graph(bundle, load_manifest(bundle))
    assert graph.prefix is not None
    assert {values.shape[2] for values in graph.prefix.values()} == {len(PREFIX)}
    names = {value.name for value in onnx.load_from_string(graph.serialized).graph.input}
    assert set(graph.prefix) == {name for name in names if name.startswith("past_")}
    assert names - set(graph.prefix) == {"input_ids", "write_indices", "logits_from"}


def test_heads_that_the_operator_refuses_are_left(tmp_path: Path) -> None:
    bundle = exported(tiny_family("llama", head_dim=8), tmp_path / "bundle")
    assert operators(bundle)[OPERATOR] == 0
    assert generation_graph(bundle, load_manifest(bundle)).prefix is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda nodes: nodes["model.context.mask"].input.__setitem__(0, "model.context.queries.output"),
        lambda nodes: setattr(nodes["model.context.positions"], "op_type", "Sub"),
        lambda nodes: nodes["model.layers.0.self_attn.k_rotary"].input.__setitem__(1, "model.rotary_emb.sin"),
        lambda nodes: nodes["model.layers.0.self_attn.k_transpose"].attribute[0].ints.__setitem__(0, 1),
        lambda nodes: setattr(nodes["model.layers.0.self_attn.o_transpose"], "op_type", "Identity"),
        lambda nodes: nodes["model.layers.0.self_attn.Attention"].attribute.append(
            onnx.helper.make_attribute("is_causal", 1)
        ),
        lambda nodes: setattr(nodes["model.layers.0.self_attn.prefix_key"], "op_type", "Expand"),
    ],
    ids=["mask", "positions", "key table", "heads", "result", "attribute", "prefix"],
)
def test_a_layer_that_was_changed_by_hand_is_left(bundle: Path, spoil: object) -> None:
    manifest = load_manifest(bundle)
    model = onnx.load_from_string(generation_graph(bundle, manifest, lowering=False).serialized)
    layers = manifest.num_hidden_layers
    spoil({node.name: node for node in model.graph.node})  # type: ignore[operator]
    lower_attention(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Attention"] >= 1
    assert kinds[OPERATOR] <= layers - 1


def test_operands_in_int8_are_left(tmp_path: Path) -> None:
    model = tiny_llama(max_positions=CAPACITY)
    block = {"model.layers.1.self_attn": AttentionPlan(query=0.1, key=0.1, value=0.1)}
    recipe = unquantized_recipe(model.checkpoint, PREFIX).model_copy(update={"attention": block})
    options = ExportOptions("float32", cache=CacheOptions("static", CAPACITY), logits="last")
    export_bundle(model.checkpoint, recipe, options, tmp_path / "bundle")
    counted = operators(tmp_path / "bundle")
    assert (counted["Attention"], counted[OPERATOR]) == (1, model.checkpoint.config.num_hidden_layers - 1)
    tokens = np.random.default_rng(3).integers(0, 99, (ROWS, 9))
    lowered, standard = (begun(tmp_path / "bundle", lowering=lowering) for lowering in (True, False))
    assert_close(lowered.step(tokens), standard.step(tokens))
