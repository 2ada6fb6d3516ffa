"""A pass in parts: what is stored is taken over where it fits, and shards come together to the whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.calibration.statistics.partial_statistics import (
    discard_parts,
    measure_in_parts,
    merge_shards,
    one_by_one,
    parse_shard,
    shard_samples,
)
from spike_export.calibration.statistics.spikes import ModuleSpikes, SpikeStatistics, save_spikes

DESCRIPTION = {
    "key": "k",
    "samples": 7,
    "model": {"source": "m", "sha256": "1"},
    "corpus": {"name": "c", "sha256": "2"},
}


def measure(samples: NDArray[np.int64]) -> SpikeStatistics:
    """Return statistics in which each sample has numbers of its own."""
    amax = np.stack([np.random.default_rng(int(sample)).random((5, 3), np.float32) for sample in samples])
    spikes = ModuleSpikes(amax.max(2), amax.max(1), amax.max((1, 2)))
    tokens, hidden = np.zeros((len(samples), 5), np.int64), amax.max((1, 2))[:, None]
    return SpikeStatistics({"m": spikes}, tokens, (), samples, hidden)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"key": "another"}'])
def test_a_part_that_is_damaged_or_of_another_pass_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    measured: list[list[int]] = []
    told: list[tuple[str, int, int]] = []
    folder, samples = tmp_path / "a" / "parts", np.arange(1, 14, 2)

    def counted(rows: NDArray[np.int64]) -> SpikeStatistics:
        measured.append(rows.tolist())
        return measure(rows)

    def asked(key: str = "key", rows: NDArray[np.int64] = samples) -> list[list[int]]:
        measured.clear()
        found = measure_in_parts(one_by_one(counted), rows, 3, folder, key, lambda *step: told.append(step))
        np.testing.assert_array_equal(found.modules["m"].token_amax, measure(rows).modules["m"].token_amax)
        return measured

    assert asked() == [[1, 3, 5], [7, 9, 11], [13]]
    assert told == [("windows", 3, 7), ("windows", 6, 7), ("windows", 7, 7)]
    assert asked() == []
    assert told[3:] == told[:3]
    (folder / "000007.json").write_bytes(damage)
    assert asked() == [[7, 9, 11]]
    (folder / "000013.safetensors").write_bytes(np.random.default_rng(0).bytes(9))
    assert asked() == [[13]]
    assert asked("other key") == [[1, 3, 5], [7, 9, 11], [13]]
    assert asked("other key", samples[[0, 2, 4]]) == [[1, 5, 9]]  # other windows under a known name
    discard_parts(folder)
    assert not folder.exists()
    discard_parts(folder)


def test_parts_that_are_done_in_any_order_are_the_whole(tmp_path: Path) -> None:
    """As workers of a cluster hand them in, the first of them stored before."""
    measure_in_parts(one_by_one(measure), np.arange(3), 3, tmp_path, "key")
    asked: list[list[int]] = []

    def backwards(parts: Sequence[NDArray[np.int64]]) -> Iterator[tuple[int, SpikeStatistics]]:
        asked.extend(rows.tolist() for rows in parts)
        for number in reversed(range(len(parts))):
            yield number, measure(parts[number])

    found = measure_in_parts(backwards, np.arange(8), 3, tmp_path, "key")
    assert asked == [[3, 4, 5], [6, 7]]
    assert found.sample_ids.tolist() == list(range(8))
    np.testing.assert_array_equal(found.modules["m"].token_amax, measure(np.arange(8)).modules["m"].token_amax)


@pytest.mark.parametrize(("text", "shard"), [("1/1", (1, 1)), ("2/8", (2, 8)), ("8/8", (8, 8)), ("007/10", (7, 10))])
def test_a_shard_is_one_of_so_many(text: str, shard: tuple[int, int]) -> None:
    assert parse_shard(text) == shard


@pytest.mark.parametrize(
    "text", ["", "2", "0/8", "9/8", "0/0", "-1/2", "1/2/3", " 1/2", "1/2\n", "1234567890/1234567890"]
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected the form 2/8: the second of eight"):
        parse_shard(text)


def test_shards_share_the_samples() -> None:
    assert [shard_samples(7, (index, 3)).tolist() for index in (1, 2, 3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert shard_samples(3, (3, 3)).tolist() == [2]
    with pytest.raises(RecipeError, match=r"^--shard 4/4: 3 samples leave this shard empty; use fewer shards$"):
        shard_samples(3, (4, 4))


def stored(folder: Path, *shards: int, of: int = 3, **changes: Any) -> list[Path]:
    """Write the shards of seven samples and return their places; `changes` are to the last one's description."""
    stems = [folder / str(index) / "spikes" for index in shards]
    for index, stem in zip(shards, stems, strict=True):
        stem.parent.mkdir()
        description = {**DESCRIPTION, **(changes if index == shards[-1] else {})}
        save_spikes(measure(shard_samples(7, (index, of))), stem, description)
    return stems


def test_shards_in_any_order_are_the_whole_and_keep_what_they_are_of(tmp_path: Path) -> None:
    merged, description = merge_shards(stored(tmp_path, 2, 3, 1))
    assert merged.sample_ids.tolist() == list(range(7))
    whole = measure(np.arange(7))
    np.testing.assert_array_equal(merged.modules["m"].token_amax, whole.modules["m"].token_amax)
    assert description == DESCRIPTION


@pytest.mark.parametrize(
    ("shards", "changes", "message"),
    [
        ((1, 2), {"key": "l"}, "2: model, corpus or options differ from those of .*1; calibrate all shards alike"),
        ((1,), {"key": None}, "1: model, corpus or options differ from those of"),
        ((1,), {"samples": None}, r"spikes\.json: does not say of which calibration it is a part"),
        ((1,), {"model": None}, "does not say of which calibration"),
        ((1,), {"corpus": None}, "does not say of which calibration"),
        ((1, 3), {}, "^2 of 7 windows are missing, the first is 1; merge all shards$"),
    ],
)
def test_shards_that_are_no_whole_are_refused(
    tmp_path: Path, shards: tuple[int, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        merge_shards(stored(tmp_path, *shards, **changes))
