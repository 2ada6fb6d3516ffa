"""Files of safetensors, written a tensor at a time, are those that the format's own library reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

from spike_export.artifacts.errors import ArtifactError
from spike_export.export.compressed_tensors.weight_shards import INDEX_FILE, StoredTensor, write_shards


def stored(name: str, values: NDArray[Any]) -> StoredTensor:
    def blocks() -> Iterator[NDArray[Any]]:
        yield from np.array_split(values, min(2, len(values)))

    return StoredTensor(name, values.dtype, values.shape, blocks)


def arrays() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.integers(-127, 128, (5, 7), np.int8),
        "b": rng.standard_normal((3, 4)).astype(np.float16),
        "c": rng.standard_normal(1).astype(np.float32),
    }


@pytest.mark.parametrize("limit", [1 << 30, 40, 1])
def test_the_library_reads_what_was_written(tmp_path: Path, limit: int) -> None:
    values, told = arrays(), list[tuple[int, int]]()
    tensors = [stored(name, array) for name, array in values.items()]
    write_shards(tensors, tmp_path, lambda _, done, total: told.append((done, total)), limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1 << 30: 1, 40: 2, 1: 3}[limit]
    found = {name: array for file in files for name, array in load_file(file).items()}
    assert found.keys() == values.keys()
    for name, array in values.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert told == [(1, 3), (2, 3), (3, 3)]
    with safe_open(files[0], "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_index_says_which_file_has_a_tensor(tmp_path: Path) -> None:
    write_shards([stored(name, array) for name, array in arrays().items()], tmp_path, shard_bytes=40)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 35 + 24 + 4
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    values = np.array([1.0, np.inf], np.float16)
    with pytest.raises(ArtifactError, match=r"layer.weight: holds NaN or infinity in float16; .* another --dtype"):
        write_shards([stored("layer.weight", values)], tmp_path)
