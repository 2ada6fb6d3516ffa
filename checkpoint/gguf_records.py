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
    known = {kind.value for kind in gguf.GGMLQuantizationType}

    class Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
        """Tells a type newer than this reader from damage, and an array that the file cannot hold from one it can.

        Slices the plain array under the memory map, which gguf slices itself: a vocabulary of 262,144 strings then
        takes a second instead of half a minute.
        """

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            header = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]  # kind of value, count
            kind, count = int(header[0][0]), int(header[1][0])
            # Each value takes a byte at least; gguf itself makes a list of as many entries as are claimed.
            if count > len(self.data) - orig_offs:
                raise ValueError(f"an array of metadata claims {count:,} values")
            if kind == gguf.GGUFValueType.STRING:
                parts, places = self._strings(orig_offs + 12, count), range(3, 3 + 2 * count, 2)
            elif kind in self.gguf_scalar_to_np:
                whole = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], count).view(np.ndarray)
                parts, places = list(whole.reshape(-1, 1)), range(2, 2 + len(whole))
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            size = sum(part.nbytes for part in (*header, *parts))
            if orig_offs + size > len(self.data) or len(places) < count:
                raise ValueError("an array of metadata ends beyond the end of the file")
            kinds = [gguf.GGUFValueType.ARRAY, *[gguf.GGUFValueType(kind)] * min(count, 1)]
            return size, [*header, *parts], list(places), kinds

        def _strings(self, end: int, count: int) -> list[NDArray[Any]]:
            """Return length and bytes of each string that begins at an offset."""
            data, order = self.data.view(np.ndarray), np.dtype(np.uint64).newbyteorder(self.byte_order)
            parts: list[NDArray[Any]] = []
            for _ in range(count):
                length = data[end : end + 8].view(order)
                begin, end = end + 8, end + 8 + int(length[0])
                parts += (length, data[begin:end])
            return parts

        def _build_tensors(self, start: int, fields: Any) -> None:
            for field in fields:
                kind = int(field.parts[4][0])
                if kind not in known:
                    raise CheckpointError(
                        f"{path}: tensor {field.name}: type {kind} is unknown; take a file of another type, such "
                        "as Q8_0, or download the file again if it is damaged"
                    )
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
