"""The unquantized graph against transformers, on random small models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from spike_export.artifacts.recipe import Dtype, Recipe
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.graph_parity import assert_close, reference_logits
from tests.support.tiny.models import LINEAR_ROPE, LLAMA3_ROPE, CachedSession, TinyModel, tiny_llama, unquantized_recipe

PREFIX = (5, 1, 9)

KINDS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "tied": {"tie": True},
    "biases": {"biases": True},
    "llama3-rope": {"rope": LLAMA3_ROPE},
    "linear-rope": {"rope": LINEAR_ROPE},
    "mistral": {"sliding_window": 6},
}


def tokens(batch: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 99, (batch, length))


def session(folder: Path, model: TinyModel, prefix: tuple[int, ...] = (), dtype: Dtype = "float32") -> CachedSession:
    recipe = unquantized_recipe(model.checkpoint, prefix, dtype) if prefix else None
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), folder / "bundle")
    return CachedSession(folder / "bundle")


@pytest.mark.parametrize("prefix", [(), PREFIX[:1], PREFIX], ids=["plain", "prefix-1", "prefix-3"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_chunks_and_decode_equal_transformers(tmp_path: Path, kind: str, prefix: tuple[int, ...]) -> None:
    model = tiny_llama(**KINDS[kind])
    ids = tokens(2, 19)
    run = session(tmp_path, model, prefix).run
    expected = reference_logits(model, ids, prefix)
    for chunks in [(), (7, 1, 11), (1,) * 19]:
        assert_close(run(ids, chunks), expected)


def test_reference_masking_is_transformers_own() -> None:
    model = tiny_llama(sliding_window=6)
    ids = tokens(2, 19)
    assert_close(reference_logits(model, ids), model.reference(torch.from_numpy(ids)).logits.numpy())


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_left_padded_rows_equal_the_rows_alone(tmp_path: Path, kind: str, prefix: tuple[int, ...]) -> None:
    model = tiny_llama(**KINDS[kind])
    ids = tokens(3, 14)
    pads = (0, 3, 9)
    mask = (np.arange(14)[None] >= np.array(pads)[:, None]).astype(np.int64)
    graph = session(tmp_path, model, prefix)
    graph.reset(3)
    # Prefill of 10 columns, then decode; the third row's prefill is padding but for its last token.
    steps = [(0, 10), *((start, start + 1) for start in range(10, 14))]
    actual = np.concatenate([graph.step(ids[:, start:end], mask[:, :end]) for start, end in steps], axis=1)
    assert np.isfinite(actual).all()
    for row, pad in enumerate(pads):
        assert_close(actual[row : row + 1, pad:], reference_logits(model, ids[row : row + 1, pad:], prefix))


def test_left_padding_equals_transformers_left_padding(tmp_path: Path) -> None:
    model = tiny_llama()
    ids, mask = tokens(2, 8), np.ones((2, 8), np.int64)
    mask[1, :3] = 0
    graph = session(tmp_path, model)
    graph.reset(2)
    positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    reference = model.reference(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), position_ids=positions
    ).logits.numpy()
    assert_close(graph.step(ids, mask)[mask == 1], reference[mask == 1])


def test_cache_holds_the_prefix_once_and_fresh_sequences_start_over(tmp_path: Path) -> None:
    model = tiny_llama()
    graph = session(tmp_path, model, PREFIX)
    first = graph.run(tokens(1, 5))
    assert {cache.shape for cache in graph.cache} == {(1, 2, len(PREFIX) + 5, 16)}
    graph.step(tokens(1, 1), np.ones((1, 6), np.int64))
    assert {cache.shape[2] for cache in graph.cache} == {len(PREFIX) + 6}
    np.testing.assert_array_equal(graph.run(tokens(1, 5)), first)


def test_every_position_of_the_model_is_usable_beside_the_prefix(tmp_path: Path) -> None:
    model = tiny_llama(max_positions=24)
    ids = tokens(1, 24)
    assert_close(session(tmp_path, model, PREFIX).run(ids), reference_logits(model, ids, PREFIX))


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
def test_float16_graph_is_close_to_float32(tmp_path: Path, prefix: tuple[int, ...]) -> None:
    model = tiny_llama()
    ids = tokens(2, 19)
    actual = session(tmp_path, model, prefix, "float16").run(ids, (7, 1, 11))
    assert actual.dtype == np.float32
    expected = reference_logits(model, ids, prefix)
    # 11 bits of mantissa: 5e-4 per rounding, a few dozen roundings on the way.
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 5e-3 * np.sqrt(np.mean(expected**2))


def graph_of(folder: Path, model: TinyModel, recipe: Recipe | None, dtype: Dtype) -> onnx.GraphProto:
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), folder / "bundle")
    return onnx.load(folder / "bundle" / "model.onnx", load_external_data=False).graph


def test_float32_graph_has_no_casts_and_no_trace_of_an_absent_prefix(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, tiny_llama(), None, "float32")
    assert not [node.name for node in graph.node if node.op_type == "Cast"]
    assert not [node.name for node in graph.node if "prefix" in node.name or node.op_type == "Expand"]
    assert not [tensor.name for tensor in graph.initializer if "prefix" in tensor.name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_unquantized_16_bit_graph_casts_only_around_norms_and_at_the_end(tmp_path: Path, dtype: Dtype) -> None:
    graph = graph_of(tmp_path, tiny_llama(), None, dtype)
    casts = [node.name for node in graph.node if node.op_type == "Cast"]
    # Two norms per layer and the last one, in and out; the logits.
    assert len(casts) == 2 * (2 * 2 + 1) + 1


def test_names_are_stable_unique_and_those_of_transformers(tmp_path: Path) -> None:
    model = tiny_llama()
    plain = graph_of(tmp_path, model, None, "float32")
    names = [node.name for node in plain.node]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "+" in name or not name]
    initializers = {tensor.name for tensor in plain.initializer}
    assert set(model.checkpoint.tensors.shapes) <= initializers
    # One node more or less renames no other.
    recipe = unquantized_recipe(model.checkpoint, PREFIX)
    prefixed = {node.name for node in graph_of(tmp_path, model, recipe, "float32").node}
    assert {name for name in names if name.startswith(("model.layers", "lm_head"))} <= prefixed


def test_graph_is_opset_24_with_plain_attention(tmp_path: Path) -> None:
    export_bundle(tiny_llama().checkpoint, None, ExportOptions("float32"), tmp_path / "bundle")
    proto = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False)
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", 24)]
    assert proto.ir_version == 11
    attention = [node for node in proto.graph.node if node.op_type == "Attention"]
    assert len(attention) == 2
    for node in attention:
        assert len(node.input) == 4
        assert len(node.output) == 1
        assert not node.attribute


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_mask_is_causal_windowed_and_never_empty(tmp_path: Path, kind: str, prefix: tuple[int, ...]) -> None:
    """Read from inside the graph: ONNX Runtime forgives a query that sees nothing, TensorRT answers NaN."""
    import onnxruntime as ort

    model = tiny_llama(**KINDS[kind])
    graph = session(tmp_path, model, prefix)
    path = tmp_path / "bundle" / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    name = f"model.context.{'window_' if kind == 'mistral' else ''}mask.output"
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None))
    onnx.save(proto, path)
    own = np.array([[1] * 12, [0] * 9 + [1] * 3], np.int64)
    feeds = {"input_ids": tokens(2, 12), "attention_mask": own}
    graph.reset(2)
    names = [value.name for value in graph.session.get_inputs()[2:]]
    inner = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (mask,) = inner.run([name], {**feeds, **dict(zip(names, graph.cache, strict=True))})
    p, window = len(prefix), model.checkpoint.config.sliding_window or 99
    slots, queries = np.arange(p + 12), np.arange(p, p + 12)[:, None]
    reach = (slots <= queries) & ((slots > queries - window) | (slots < p))
    visible = np.concatenate([np.ones((2, p), bool), own == 1], axis=1)[:, None, None]
    np.testing.assert_array_equal(mask, (visible & reach) | (slots == queries))
