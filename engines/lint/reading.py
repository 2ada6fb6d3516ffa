"""Reads an ONNX file of any size for its structure: large tensors stay on the disk, inline ones too.

A protobuf parser holds every byte of the message. The wire format is simple enough to leave the large tensors of the
graph out before parsing, and to remember where in the file their bytes are.
"""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from spike_export.artifacts.errors import ArtifactError, one_line
from spike_export.artifacts.files.documents import require_file
from spike_export.artifacts.graph_gate import graph_fault

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_NAME, _TENSOR_RAW = 8, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Field numbers of onnx.proto, and protobuf's wire types."""

_KEPT_INLINE = 1 << 16
"""Bytes of an initializer's message that are parsed; what is larger is a weight, not a scale of shapes or axes."""

_LARGEST_READ = 1 << 26
"""Bytes of a constant that a rule may read; scales of the largest vocabularies take less than a megabyte."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are.

    Attributes:
        offset: Bytes from the file's beginning.
        length: Bytes, or None where the model does not say.
    """

    file: Path
    offset: int
    length: int | None


@dataclass(frozen=True)
class ModelFile:
    """An ONNX file without the large tensors' values.

    Attributes:
        model: Large inline initializers have their name, type and shape only.
        size: Bytes of the file itself.
        inline: Name of a large inline initializer → where its bytes are.
    """

    path: Path
    model: onnx.ModelProto
    size: int
    inline: Mapping[str, Place]

    def place(self, tensor: TensorProto) -> Place | None:
        """Return where a tensor's bytes are, or None where they are in `model`."""
        if tensor.name in self.inline:
            return self.inline[tensor.name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return None
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            offset, length = int(entries.get("offset", 0)), int(entries["length"]) if "length" in entries else None
        except ValueError:
            raise ArtifactError(
                f"{self.path}: tensor {tensor.name!r} has no readable place in its data file; export the model again"
            ) from None
        return Place(self.path.parent / entries.get("location", ""), offset, length)

    def values(self, tensor: TensorProto) -> NDArray[Any] | None:
        """Return a tensor's values, or None where they are missing, incomplete or too many to read."""
        try:
            place = self.place(tensor)
            return onnx.numpy_helper.to_array(tensor) if place is None else _read(tensor, place)
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            return None  # a damaged constant says nothing; that its file is incomplete is a finding of its own


def _read(tensor: TensorProto, place: Place) -> NDArray[Any] | None:
    if tensor.data_type in (TensorProto.STRING, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1):
        return None
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    count = int(np.prod(tensor.dims, dtype=np.int64))
    if min(count, place.offset) < 0 or count * dtype.itemsize > _LARGEST_READ or not place.file.is_file():
        return None
    with place.file.open("rb") as file:
        file.seek(place.offset)
        stored = file.read(count * dtype.itemsize)
    return np.frombuffer(stored, dtype).reshape(tuple(tensor.dims))


def read_model(path: Path) -> ModelFile:
    """Read a model's structure.

    Raises:
        ArtifactError: The file is missing, truncated, or not an ONNX model.
    """
    try:
        require_file(path)
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            stored, inline = _without_weights(data, path)
    except (OSError, ValueError) as error:  # ValueError: an empty file, or bytes that are no protobuf message
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ArtifactError(f"{path}: not a readable ONNX model ({reason}); give an .onnx file or a bundle") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(stored)
    except Exception as error:  # protobuf's decode error has no public name that survives its versions
        raise ArtifactError(
            f"{path}: not a readable ONNX model ({one_line(error)}); export or download it again"
        ) from error
    if not model.HasField("graph") or not model.ir_version:
        raise ArtifactError(f"{path}: not an ONNX model (it holds no graph); give an .onnx file or a bundle")
    fault = graph_fault(model)
    if fault:
        raise ArtifactError(f"{path}: not a valid ONNX model ({fault}); export or download it again")
    return ModelFile(path, model, size, inline)


def _without_weights(data: mmap.mmap, path: Path) -> tuple[bytes, dict[str, Place]]:
    """Return the message without its large tensors' raw bytes, and where those are."""
    kept: list[bytes] = []
    inline: dict[str, Place] = {}
    for field in _fields(data, 0, len(data)):
        if field.number == _MODEL_GRAPH and field.kind == _BYTES:
            graph = b"".join(_graph_parts(data, field, path, inline))
            kept.append(_length_delimited(_MODEL_GRAPH, graph))
        else:
            kept.append(data[field.start : field.end])
    return b"".join(kept), inline


def _graph_parts(data: mmap.mmap, graph: "_Field", path: Path, inline: dict[str, Place]) -> Iterator[bytes]:
    for field in _fields(data, graph.content, graph.end):
        large = field.end - field.content > _KEPT_INLINE
        if field.number != _GRAPH_INITIALIZER or field.kind != _BYTES or not large:
            yield data[field.start : field.end]
            continue
        parts = list(_fields(data, field.content, field.end))
        raw = next((part for part in parts if part.number == _TENSOR_RAW), None)
        name = next((data[part.content : part.end] for part in parts if part.number == _TENSOR_NAME), b"")
        if raw is not None:
            inline[name.decode(errors="replace")] = Place(path, raw.content, raw.end - raw.content)
        kept = [data[part.start : part.end] for part in parts if part is not raw]
        yield _length_delimited(_GRAPH_INITIALIZER, b"".join(kept))


@dataclass(frozen=True, slots=True)
class _Field:
    """A field of a message: `start` to `end` with its tag, its content from `content` on."""

    number: int
    kind: int
    start: int
    content: int
    end: int


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        tag, content = _varint(data, at, end)
        kind = tag & 7
        if kind == _VARINT:
            _, stop = _varint(data, content, end)
        elif kind == _BYTES:
            length, content = _varint(data, content, end)
            stop = content + length
        elif kind in (_FIXED32, _FIXED64):
            stop = content + (4 if kind == _FIXED32 else 8)
        else:
            raise ValueError("no protobuf message")
        if stop > end:
            raise ValueError("it is truncated")
        yield _Field(tag >> 3, kind, at, content, stop)
        at = stop


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Return a base-128 number and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("it is truncated")


def _length_delimited(number: int, content: bytes) -> bytes:
    header = bytearray()
    for value in (number << 3 | _BYTES, len(content)):
        while value > 0x7F:
            header.append(value & 0x7F | 0x80)
            value >>= 7
        header.append(value)
    return bytes(header) + content
