"""What a GGUF file holds, by the gguf library: metadata, and where each tensor lies."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CheckpointError, one_line

_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type"))
"""Metadata that only the tokenizer needs, and that take seconds to decode."""


def read_gguf(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return metadata without the vocabulary, and gguf's records of tensors by name.

    Raises:
        CheckpointError: The file is damaged, or one of its types is unknown to gguf.
    """
    import gguf

    # gguf warns about byte orders and unknown keys on its own logger; a damaged file raises anyway.
    logging.getLogger("gguf").setLevel(logging.ERROR)

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
        """Tells a type newer than gguf from damage, and an array that the file cannot hold from one it can."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            array = _array_parts(self, orig_offs) if raw_type == gguf.GGUFValueType.ARRAY else None
            return array or super()._get_field_parts(orig_offs, raw_type)

        def _build_tensors(self, start: int, fields: Any) -> None:
            _require_known_types(path, fields)
            super()._build_tensors(start, fields)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name not in _VOCABULARY}
        # The reader maps the file without looking at the end: touching each record finds a truncated one.
        size = path.stat().st_size
        for tensor in reader.tensors:
            if int(tensor.data_offset) + int(tensor.n_bytes) > size:
                raise ValueError(f"tensor {tensor.name} ends beyond the end of the file")
    except CheckpointError:
        raise
    except Exception as error:  # ValueError, IndexError, struct and numpy errors: all mean a damaged file
        raise CheckpointError(
            f"{path}: damaged or truncated GGUF file ({one_line(error)}); download it again"
        ) from error
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _array_parts(reader: Any, offset: int) -> tuple[int, list[NDArray[Any]], list[int], list[Any]] | None:
    """Return bytes, parts, places of the values among the parts, and kinds of an array; None for arrays of arrays.

    Slices the plain array under the memory map, which gguf slices itself: a vocabulary of 262,144 strings then takes a
    second instead of half a minute.
    """
    import gguf

    header = [reader._get(offset, np.uint32), reader._get(offset + 4, np.uint64)]  # kind of value, count
    kind, count = int(header[0][0]), int(header[1][0])
    # Each value takes a byte at least; gguf itself makes a list of as many entries as are claimed.
    if count > len(reader.data) - offset:
        raise ValueError(f"an array of metadata claims {count:,} values")
    if kind == gguf.GGUFValueType.STRING:
        parts, places = _strings(reader, offset + 12, count), range(3, 3 + 2 * count, 2)
    elif kind in reader.gguf_scalar_to_np:
        whole = reader._get(offset + 12, reader.gguf_scalar_to_np[kind], count).view(np.ndarray)
        parts, places = list(whole.reshape(-1, 1)), range(2, 2 + len(whole))
    else:
        return None
    size = sum(part.nbytes for part in (*header, *parts))
    if offset + size > len(reader.data) or len(places) < count:
        raise ValueError("an array of metadata ends beyond the end of the file")
    kinds = [gguf.GGUFValueType.ARRAY, *[gguf.GGUFValueType(kind)] * min(count, 1)]
    return size, [*header, *parts], list(places), kinds


def _strings(reader: Any, end: int, count: int) -> list[NDArray[Any]]:
    """Return length and bytes of each string of an array, the first of which begins at an offset."""
    data, order = reader.data.view(np.ndarray), np.dtype(np.uint64).newbyteorder(reader.byte_order)
    parts: list[NDArray[Any]] = []
    for _ in range(count):
        length = data[end : end + 8].view(order)
        begin, end = end + 8, end + 8 + int(length[0])
        parts += (length, data[begin:end])
    return parts


def _require_known_types(path: Path, fields: Any) -> None:
    import gguf

    known = {kind.value for kind in gguf.GGMLQuantizationType}
    for field in fields:
        kind = int(field.parts[4][0])
        if kind not in known:
            raise CheckpointError(
                f"{path}: tensor {field.name}: type {kind} is unknown; take a file of another type, such as Q8_0, or "
                "download the file again if it is damaged"
            )
