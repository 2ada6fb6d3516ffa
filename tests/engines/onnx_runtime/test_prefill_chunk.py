"""A call's tokens: as many as products like, unless their scores would take too much memory."""

from pathlib import Path

import pytest

from spike_export.artifacts.manifest import load_manifest
from spike_export.engines.onnx_runtime.prefill_chunk import LARGEST, LEAST, SCORES_BYTES, prefill_chunk
from spike_export.engines.onnx_runtime.session import open_for_generation
from spike_export.engines.onnx_runtime.slots import PART, open_slots
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.tiny.models import tiny_llama


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("chunk") / "bundle", tiny_llama(max_positions=40)
    export_bundle(model.checkpoint, None, ExportOptions("float32", cache=CacheOptions("static", 40)), folder)
    return folder


@pytest.mark.parametrize(("heads", "slots"), [(9, 2048), (32, 4096), (32, 32768), (128, 131072)])
def test_scores_are_bounded(bundle: Path, heads: int, slots: int) -> None:
    manifest = load_manifest(bundle).model_copy(update={"num_attention_heads": heads, "cache_slots": slots})
    chunk, row = prefill_chunk(manifest), 4 * heads * slots
    assert LEAST <= chunk <= LARGEST
    assert chunk == LARGEST or (chunk + 1) * row > SCORES_BYTES
    assert chunk == LEAST or chunk * row <= SCORES_BYTES


def test_rows_of_a_server_read_no_more(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_for_generation(bundle, 1)
    assert open_slots(session, 2).chunk == PART
    monkeypatch.setattr("spike_export.engines.onnx_runtime.prefill_chunk.SCORES_BYTES", 0)
    assert open_slots(session, 2).chunk == LEAST
