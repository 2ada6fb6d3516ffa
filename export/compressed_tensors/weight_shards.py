"""Writes tensors to safetensors files, one tensor at a time: memory never holds the whole model."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.progress import Progress, silent

INDEX_FILE = "model.safetensors.index.json"

_SHARD_BYTES = 5 << 30
"""Largest file, unless one tensor is larger."""

_ALIGNMENT = 8
"""Bytes; the header is padded to a multiple, as the format's own writer does."""

_NAMES = {
    np.dtype(np.int8): "I8",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float32): "F32",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is made when it is written.

    Attributes:
        name: In the file.
        dtype: Of its elements.
        shape: Its dimensions.
        blocks: Yields its elements in order, some rows at a time.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[NDArray[Any]]]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_shards(
    tensors: Sequence[StoredTensor], folder: Path, progress: Progress = silent, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or several files and their index.

    Args:
        tensors: In the order in which they are written.
        folder: An existing folder.
        progress: Told of every tensor written.
        shard_bytes: Largest file, unless one tensor is larger.

    Raises:
        OSError: A file cannot be written.
        ArtifactError: A tensor is not finite.
    """
    shards = _shards(tensors, shard_bytes)
    names = [_file_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                for block in tensor.blocks():
                    _require_finite(tensor, block)
                    file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                done += 1
                progress("tensors", done, len(tensors))
    if len(shards) > 1:
        _write_index(folder, names, shards)


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shards(tensors: Sequence[StoredTensor], limit: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + tensor.bytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _header(tensors: Sequence[StoredTensor]) -> bytes:
    """Return the beginning of a file: the length of a JSON object, and the object.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.bytes
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_index(folder: Path, names: Sequence[str], shards: Sequence[Sequence[StoredTensor]]) -> None:
    places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    size = sum(tensor.bytes for shard in shards for tensor in shard)
    document = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _require_finite(tensor: StoredTensor, block: NDArray[Any]) -> None:
    if tensor.dtype != np.int8 and not np.isfinite(block).all():
        raise ArtifactError(
            f"{tensor.name}: holds NaN or infinity in {tensor.dtype}; download the model again if it is damaged, or "
            "export with another --dtype if its weights are too large for this one"
        )
