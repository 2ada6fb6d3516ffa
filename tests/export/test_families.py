"""The graph of every dense family against transformers: unquantized, quantized, with a prefix, with each rope."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.process import host_memory
from spike_export.artifacts.recipe import Dtype
from spike_export.checkpoint.families import FAMILIES
from spike_export.export.attention.rope import rotary_tables
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.export.test_schemes import FLIP, SUMMATION, Case, recipe_of, simulated
from tests.export.test_schemes import tokens as measured_tokens
from tests.support.cached_forward import cached_logits
from tests.support.graph_parity import PARITY, reference_logits, relative_error, token_errors
from tests.support.ropes import BY_LENGTH, ROPES
from tests.support.tiny.families import MIXTURES, WINDOW, tiny_family, tokens
from tests.support.tiny.models import CachedSession, TinyModel, unquantized_recipe

PREFIX = (5, 1, 9)
LENGTH = 24
CHUNKS: tuple[tuple[int, ...], ...] = ((LENGTH,), (7, 1, LENGTH - 8), (1,) * LENGTH)
"""Prefill, chunked prefill, decode."""

HALF = 1e-2
"""Relative rms error of a float16 graph: 5e-4 for each of a few dozen roundings. Seen: 2e-3."""

DENSE = tuple(name for name in FAMILIES if name not in MIXTURES)


def export(folder: Path, model: TinyModel, prefix: tuple[int, ...] = (), dtype: Dtype = "float32") -> CachedSession:
    """Export with all linears unquantized and open the bundle."""
    recipe = unquantized_recipe(model.checkpoint, prefix, dtype) if prefix else None
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), folder / "bundle")
    return CachedSession(folder / "bundle")


def small(name: str, **changes: Any) -> TinyModel:
    """Two layers, of which each has its own kind of window where the family has two."""
    if name == "qwen2":
        changes = {"max_window_layers": 1, **changes}
    return tiny_family(name, num_hidden_layers=2, **changes)


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
@pytest.mark.parametrize("name", DENSE)
def test_every_family_equals_transformers(tmp_path: Path, name: str, prefix: tuple[int, ...]) -> None:
    model, ids = tiny_family(name, attention="eager"), tokens(rows=2, length=LENGTH)
    assert 2 * WINDOW < LENGTH
    expected, session = reference_logits(model, ids, prefix), export(tmp_path, model, prefix)
    for chunks in CHUNKS:
        assert relative_error(session.run(ids, chunks), expected) < PARITY
    architectures = json.loads((tmp_path / "bundle" / "config.json").read_text())["architectures"]
    assert architectures == [type(model.reference).__name__]


@pytest.mark.parametrize("name", DENSE)
def test_left_padded_rows_equal_the_rows_alone(tmp_path: Path, name: str) -> None:
    model, ids, pads = small(name, attention="eager"), tokens(rows=3, length=LENGTH), (0, 3, 13)
    mask = (np.arange(LENGTH)[None] >= np.array(pads)[:, None]).astype(np.int64)
    session = export(tmp_path, model, PREFIX)
    session.reset(3)
    # The third row's prefill is padding but for its last token.
    steps = [(0, 14), (14, 15), (15, LENGTH)]
    actual = np.concatenate([session.step(ids[:, start:end], mask[:, :end]) for start, end in steps], axis=1)
    for row, pad in enumerate(pads):
        alone = ids[row : row + 1, pad:]
        assert relative_error(actual[row : row + 1, pad:], reference_logits(model, alone, PREFIX)) < PARITY


@pytest.mark.parametrize("name", DENSE)
def test_the_float16_graph_is_close(tmp_path: Path, name: str) -> None:
    model, ids = small(name, attention="eager"), tokens(rows=2, length=LENGTH)
    actual, expected = (
        export(tmp_path, model, PREFIX, "float16").run(ids, (20, 4)),
        reference_logits(model, ids, PREFIX),
    )
    assert np.sqrt(np.mean((actual - expected) ** 2)) < HALF * np.sqrt(np.mean(expected**2))


@dataclass(frozen=True)
class Fault:
    """An initializer of a family's graph that is to be wrong, and the factor by which it is."""

    family: str
    initializer: str
    factor: float = 1.02


FAULTS = (
    Fault("gemma", f"float32.{48**0.5!r}"),
    Fault("gemma", "model.norm.gain"),
    Fault("gemma2", "float32.50.0", 0.2),
    Fault("gemma2", "float32.30.0", 0.5),
    Fault("gemma2", "float32.0.25"),
    Fault("gemma3_text", "model.layers.1.self_attn.k_norm.gain"),
    Fault("gemma3_text", "model.rotary_emb.sliding_attention.cos"),
    Fault("gemma3_text", "model.rotary_emb.full_attention.sin"),
    Fault("granite", "float32.12.0"),
    Fault("granite", "float32.0.22"),
    Fault("granite", "float32.8.0"),
    Fault("olmo2", "model.layers.0.self_attn.q_norm.weight"),
    Fault("olmo2", "model.layers.1.post_feedforward_layernorm.weight"),
    Fault("phi3", "model.layers.1.mlp.gate_up_proj.weight"),
    Fault("qwen3", "model.layers.0.self_attn.q_norm.weight"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.family}-{fault.initializer}")
def test_a_planted_fault_is_noticed(tmp_path: Path, fault: Fault) -> None:
    model, ids = small(fault.family, attention="eager"), tokens(rows=1, length=LENGTH)
    export(tmp_path, model)
    graph = onnx.load(tmp_path / "bundle" / "model.onnx")
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.name == fault.initializer)
    wrong = onnx.numpy_helper.to_array(tensor) * np.float32(fault.factor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, fault.initializer))
    onnx.save(graph, tmp_path / "model.onnx")
    assert relative_error(CachedSession(tmp_path).run(ids), reference_logits(model, ids)) > 10 * PARITY


@pytest.mark.parametrize("name", ["gemma3_text", "granite"])
def test_a_scale_of_the_scores_is_the_operators_own(tmp_path: Path, name: str) -> None:
    model = small(name)
    export(tmp_path, model)
    graph = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False).graph
    scales = [node.attribute for node in graph.node if node.op_type == "Attention"]
    assert [(each[0].name, each[0].f) for each in scales] == [
        ("scale", np.float32(model.checkpoint.config.factors.attention))
    ] * 2


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_equals_transformers_within_and_beyond_the_original_length(
    tmp_path: Path, kind: str, prefix: tuple[int, ...]
) -> None:
    family, changes = ROPES[kind]
    model, ids = small(family, **changes), tokens(rows=2, length=LENGTH)
    session = export(tmp_path, model, prefix)
    for chunks in [(6,), *CHUNKS]:
        fed = ids[:, : sum(chunks)]
        expected = cached_logits(model, fed, chunks, prefix)
        assert relative_error(session.run(fed, chunks), expected) < PARITY
        if kind in BY_LENGTH and len(chunks) > 1:
            # Keys that were cached within the length keep their frequencies.
            assert relative_error(cached_logits(model, fed, (LENGTH,), prefix), expected) > 1e-3


def test_rotary_tables_that_exceed_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 8 * 128 * 16 - 1)
    with pytest.raises(
        CheckpointError, match=r"^max_position_embeddings 128: rotary .*; correct the configuration, or"
    ):
        rotary_tables(tiny_family("llama").checkpoint.config.rope(None), 128)


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_the_length_is_each_rows_own(tmp_path: Path, kind: str) -> None:
    family, changes = ROPES[kind]
    model, ids, pads = small(family, **changes), tokens(rows=2, length=LENGTH), (0, 14)
    mask = (np.arange(LENGTH)[None] >= np.array(pads)[:, None]).astype(np.int64)
    session = export(tmp_path, model)
    session.reset(2)
    logits = session.step(ids, mask)
    for row, pad in enumerate(pads):
        alone = ids[row : row + 1, pad:]
        assert relative_error(logits[row : row + 1, pad:], cached_logits(model, alone, (LENGTH - pad,))) < PARITY


@pytest.mark.parametrize("kind", ROPES)
def test_a_rope_is_none_in_name_only(kind: str) -> None:
    family, changes = ROPES[kind]
    rest = {key: value for key, value in changes.items() if key != "rope_parameters"}
    ids = tokens(rows=1, length=LENGTH)
    scaled, plain = (cached_logits(small(family, **each), ids, (LENGTH,)) for each in (changes, rest))
    assert relative_error(scaled, plain) > 1e-3


SCHEMES: Mapping[str, Case] = {
    "static": Case(prefix=PREFIX),
    "per token": Case(per_token=None),
    "weights": Case(weight_only=None),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", DENSE)
def test_every_scheme_equals_the_simulation(tmp_path: Path, name: str, scheme: str) -> None:
    assert_simulated(tmp_path, small(name), SCHEMES[scheme])


def test_int8_operands_of_bounded_attention_equal_the_simulation(tmp_path: Path) -> None:
    assert_simulated(tmp_path, small("gemma2"), Case(attention=True, prefix=PREFIX))


def assert_simulated(folder: Path, model: TinyModel, case: Case) -> None:
    recipe = recipe_of(case, model.checkpoint)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), folder / "bundle")
    expected, session = simulated(model.checkpoint, recipe), CachedSession(folder / "bundle")
    for chunks in ((), (5, 1, 6)):
        found = token_errors(session.run(measured_tokens(), chunks), expected)
        assert np.median(found) < SUMMATION
        assert found.max() < FLIP
