"""Options of a graph together: what goes together is computed right, what does not is refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.artifacts.errors import EngineError, RecipeError
from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime.session import BundleSession, open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import TinyModel, input_scales, tiny_llama, tiny_recipe

STATIC = CacheOptions("static", 24)
PREFIX = (5, 1, 9)
IDS = np.random.default_rng(0).integers(3, 99, (2, 7))
COUNTS = np.array([7, 4])


def opened(folder: Path, model: TinyModel, **options: Any) -> BundleSession:
    scales = input_scales(model, IDS)
    recipe = tiny_recipe(model.checkpoint, scales, prefix=PREFIX)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32", **options), folder)
    return open_bundle(folder, threads=1)


@pytest.mark.parametrize("cache", [CacheOptions(), STATIC], ids=["dynamic", "static"])
def test_last_token_logits_step_by_step(tmp_path: Path, cache: CacheOptions) -> None:
    model = tiny_llama()
    every, last = (opened(tmp_path / logits, model, cache=cache, logits=logits).begin(2) for logits in ("all", "last"))
    for tokens in (IDS, IDS[:, :1]):
        expected = every.step(tokens)
        np.testing.assert_allclose(last.step(tokens), expected[:, -1:], atol=1e-6 * np.abs(expected).max())


def test_last_token_logits_of_ragged_rows_are_each_rows_last_where_rows_are_padded_on_the_left(tmp_path: Path) -> None:
    model = tiny_llama()
    every, last = (opened(tmp_path / logits, model, logits=logits).begin(2) for logits in ("all", "last"))
    expected = every.step(IDS, COUNTS)[np.arange(2), COUNTS - 1]
    np.testing.assert_allclose(last.step(IDS, COUNTS)[:, 0], expected, atol=1e-6 * np.abs(expected).max())


def test_ragged_rows_of_a_static_cache_need_all_logits(tmp_path: Path) -> None:
    sequences = opened(tmp_path / "b", tiny_llama(), cache=STATIC, logits="last").begin(2)
    with pytest.raises(EngineError, match=r"rows of different lengths .* export with --logits all"):
        sequences.step(IDS, COUNTS)
    assert sequences.lengths.tolist() == [0, 0]


def test_a_prefix_in_attention_and_a_static_cache_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="--prefix-in attention copies the cache"):
        ExportOptions(cache=STATIC, prefix_in="attention")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_a_rope_that_depends_on_the_length_needs_a_dynamic_cache(tmp_path: Path, rope: dict[str, Any]) -> None:
    model = tiny_llama(rope=rope)
    with pytest.raises(RecipeError, match=f"--kv-cache static: rope '{rope['rope_type']}' depends on"):
        export_bundle(model.checkpoint, None, ExportOptions("float32", cache=STATIC), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_manifest_says_why_genai_cannot_drive_a_static_cache(tmp_path: Path) -> None:
    export_bundle(tiny_llama().checkpoint, None, ExportOptions("float32", cache=STATIC), tmp_path / "b")
    reason = load_manifest(tmp_path / "b").unsupported["onnxruntime-genai"]
    assert "write_indices" in reason
    assert "--kv-cache dynamic" in reason
