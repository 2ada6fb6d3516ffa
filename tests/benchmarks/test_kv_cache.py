"""The cache benchmark on a tiny model: what it compares, and that every sequence fits."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import kv_cache
from spike_export.artifacts.manifest import load_manifest
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe


def test_it_compares_the_dynamic_cache_with_buffers_that_fit_that_are_too_large_and_that_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(layers=1)
    tokens = np.random.default_rng(0).integers(3, 99, (2, 16))
    plain = tiny_recipe(model.checkpoint, input_scales(model, tokens), prefix=(1, 5))
    recipe = with_kv_cache(plain, model.checkpoint, tokens)
    monkeypatch.setattr("spike_export.checkpoint.opening.open_checkpoint", lambda _: model.checkpoint)
    monkeypatch.setattr(kv_cache, "quick_recipe", lambda *_, **__: recipe)
    monkeypatch.setattr(kv_cache, "in_own_process", lambda use, *given: use(*given))
    arguments = argparse.Namespace(model="tiny", recipe=None, contexts=[4, 16], decodes=3, threads=1, in_steps=False)
    results = kv_cache.measure(arguments, tmp_path)
    assert [(result.context, result.cache.name) for result in results] == [
        *(
            (4, "dynamic"),
            (4, "static 9"),
            (4, "static 21"),
            (4, "static 21 in steps"),
            (4, "static 21 in steps, INT8"),
        ),
        *((16, "dynamic"), (16, "static 21"), (16, "static 21 in steps"), (16, "static 21 in steps, INT8")),
    ]
    assert [cache.name for cache in kv_cache.caches([16], 3, in_steps=True)[16]] == [
        "static 21 in steps",
        "static 21 in steps, INT8",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"dynamic", "static-9", "static-21", "static-21-int8"}
    assert [result.token_bytes // results[-1].token_bytes for result in results[:5]] == [4, 4, 4, 4, 1]
    assert load_manifest(tmp_path / "static-9").cache_slots == 2 + 9
    assert all(result.decode.calls == 3 and result.peak_rss > 1 << 20 for result in results)
    assert [kv_cache.ratio(results, result) for result in results if result.cache.capacity is None] == [1.0, 1.0]
    assert len(kv_cache.table(results).splitlines()) == 1 + len(results)
    told = kv_cache.as_json(results, 1)["caches"]
    assert [(cache["capacity"], cache["grows"]) for cache in told][1:4] == [(9, False), (21, False), (21, True)]
    assert [cache["int8"] for cache in told][:5] == [False] * 4 + [True]
    # The bundles are there: nothing is exported again.
    monkeypatch.setattr(kv_cache, "quick_recipe", None)
    kv_cache.build_bundles(arguments, tmp_path, {(None, False), (9, False), (21, False), (21, True)})
    # Nor is it measured in place of what another recipe or another model would give.
    other = recipe.model_copy(update={"prefix": None})
    monkeypatch.setattr(kv_cache, "quick_recipe", lambda *_, **__: other)
    with pytest.raises(SystemExit, match="dynamic: made by another recipe; give another --bundles"):
        kv_cache.build_bundles(arguments, tmp_path, {(None, False), (10, False)})
    # A recipe without steps has no cache in INT8.
    monkeypatch.setattr(kv_cache, "quick_recipe", lambda *_, **__: plain)
    assert kv_cache.build_bundles(arguments, tmp_path / "plain", {(9, False), (9, True)}).keys() == {(9, False)}
    monkeypatch.setattr("spike_export.checkpoint.opening.open_checkpoint", lambda _: tiny_llama(layers=2).checkpoint)
    with pytest.raises(SystemExit, match=r"static-9: made of .*; give another --bundles"):
        kv_cache.build_bundles(arguments, tmp_path, {(9, False)})
    assert not (tmp_path / "static-10").exists()
