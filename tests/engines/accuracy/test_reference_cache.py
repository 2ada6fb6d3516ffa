"""A second check of the same model, prefix and text computes no unquantized model; anything else does."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.engines.accuracy.comparison import references
from spike_export.engines.accuracy.predictions import record_type
from spike_export.engines.accuracy.reference_cache import ReferenceCache
from tests.support.tiny.models import TinyModel, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1
CONTENT = np.random.default_rng(0).integers(3, 99, (3, 20))
OTHER = CONTENT - 1
SIZE = 3 * 19 * record_type(99).itemsize


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return tiny_llama()


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path / "cache", "model", limit=10 * SIZE)


def computed(
    model: TinyModel, cache: ReferenceCache | None, *wanted: tuple[NDArray[np.int64], tuple[int, ...]]
) -> tuple[int, list[NDArray[np.void]]]:
    """Return how many tokens passed the model, and the predictions."""
    decoder = Decoder(model.checkpoint)
    with references(lambda: decoder, wanted, BOS, cache=cache) as found:
        return decoder.meter.tokens, [np.array(each.rows) for each in found]


def test_a_second_check_reads_what_the_first_one_computed(model: TinyModel, cache: ReferenceCache) -> None:
    tokens, first = computed(model, cache, (CONTENT, ()), (CONTENT, (BOS, 5)))
    assert tokens > 0
    again, second = computed(model, cache, (CONTENT, ()), (CONTENT, (BOS, 5)))
    _, alone = computed(model, None, (CONTENT, ()), (CONTENT, (BOS, 5)))
    assert again == 0
    for one, two, three in zip(first, second, alone, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("content", "prefix"), [(OTHER, ()), (CONTENT, (BOS, 5)), (CONTENT[:2], ()), (CONTENT.reshape(6, 10), ())]
)
def test_another_text_or_prefix_is_computed(
    model: TinyModel, cache: ReferenceCache, content: NDArray[np.int64], prefix: tuple[int, ...]
) -> None:
    computed(model, cache, (CONTENT, ()))
    tokens, (rows,) = computed(model, cache, (content, prefix))
    assert tokens > 0
    np.testing.assert_array_equal(rows, computed(model, None, (content, prefix))[1][0])


@pytest.mark.parametrize("change", [{"model": "another"}, {"fresh": True}])
def test_another_model_or_a_forced_check_is_computed(
    model: TinyModel, cache: ReferenceCache, change: dict[str, object]
) -> None:
    computed(model, cache, (CONTENT, ()))
    assert computed(model, replace(cache, **change), (CONTENT, ()))[0] > 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"not numpy",
        lambda content: content[:-1],
        lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    ],
    ids=["empty", "foreign", "short", "one bit"],
)
def test_a_damaged_file_is_computed_anew(
    model: TinyModel, cache: ReferenceCache, damage: Callable[[bytes], bytes]
) -> None:
    _, (first,) = computed(model, cache, (CONTENT, ()))
    (file,) = cache.folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    tokens, (rows,) = computed(model, cache, (CONTENT, ()))
    assert tokens > 0
    np.testing.assert_array_equal(rows, first)
    assert computed(model, cache, (CONTENT, ()))[0] == 0


def use(model: TinyModel, cache: ReferenceCache, prefixes: Sequence[int], now: int) -> list[bool]:
    """Ask for the windows behind prefixes, at a time; return for each whether it was computed."""
    known = []
    for prefix in prefixes:
        known.append(computed(model, cache, (CONTENT, (prefix,)))[0] > 0)
        os.utime(cache.file(CONTENT, (prefix,), BOS), (now, now))
    return known


def test_the_least_recently_used_make_room(model: TinyModel, cache: ReferenceCache) -> None:
    small = replace(cache, limit=3 * SIZE + 2000)
    assert use(model, small, [5, 6, 7], now=1000) == [True] * 3
    assert use(model, small, [5], now=2000) == [False]
    assert use(model, small, [8], now=3000) == [True]
    assert sum(file.stat().st_size for file in small.folder.iterdir()) <= small.limit
    assert use(model, small, [5, 8], now=4000) == [False, False]


def test_what_exceeds_the_cache_or_cannot_be_written_is_not_kept(
    model: TinyModel, cache: ReferenceCache, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for poor in (replace(cache, limit=SIZE - 1), replace(cache, folder=tmp_path / "file" / "cache")):
        assert computed(model, poor, (CONTENT, ()))[0] > 0
        assert computed(model, poor, (CONTENT, ()))[0] > 0
    assert not cache.folder.exists()
