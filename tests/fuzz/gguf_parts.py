"""A GGUF file taken apart into its entries, so that one of them can be changed and the rest stay a GGUF file."""

import struct
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """A key of the metadata with its type and its value as bytes."""

    key: bytes
    kind: int
    value: bytes


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it."""

    name: bytes
    dims: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufParts:
    """What a file consists of; `counts` replaces how many tensors and entries it says it has."""

    entries: tuple[Entry, ...]
    tensors: tuple[TensorEntry, ...]
    data: bytes
    counts: tuple[int, int] | None = None
    magic: bytes = field(default=b"GGUF" + struct.pack("<I", 3))

    @classmethod
    def of(cls, content: bytes) -> "GgufParts":
        """Take a valid file apart."""
        reader = _Reader(content)
        reader.place = 8
        tensors, entries = reader.number(8), reader.number(8)
        found = tuple(Entry(reader.text(), kind := reader.number(4), reader.value(kind)) for _ in range(entries))
        described = tuple(
            TensorEntry(
                reader.text(),
                tuple(reader.number(8) for _ in range(reader.number(4))),
                reader.number(4),
                reader.number(8),
            )
            for _ in range(tensors)
        )
        return cls(found, described, content[-(-reader.place // _ALIGNMENT) * _ALIGNMENT :])

    def content(self) -> bytes:
        """Return the file."""
        counts = self.counts or (len(self.tensors), len(self.entries))
        header = self.magic + struct.pack("<QQ", *counts)
        header += b"".join(_text(e.key) + struct.pack("<I", e.kind) + e.value for e in self.entries)
        for tensor in self.tensors:
            header += _text(tensor.name) + struct.pack("<I", len(tensor.dims))
            header += b"".join(struct.pack("<Q", size) for size in tensor.dims)
            header += struct.pack("<IQ", tensor.kind, tensor.offset)
        return header + b"\0" * (-len(header) % _ALIGNMENT) + self.data


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content, self.place = content, 0

    def take(self, count: int) -> bytes:
        self.place += count
        return self._content[self.place - count : self.place]

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self) -> bytes:
        return self.take(self.number(8))

    def value(self, kind: int) -> bytes:
        start = self.place
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner, count = self.number(4), self.number(8)
            for _ in range(count):
                self.value(inner)
        else:
            self.take(_WIDTHS[kind])
        return self._content[start : self.place]


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


_VALUES = (
    (4, struct.pack("<I", 0)),
    (4, struct.pack("<I", 3)),
    (4, struct.pack("<I", 2**32 - 1)),
    (5, struct.pack("<i", -4)),
    (6, struct.pack("<f", float("nan"))),
    (6, struct.pack("<f", 0.0)),
    (7, b"\x01"),
    (8, _text(b"x")),
    (8, _text(b"\xff\xfe")),
    (8, struct.pack("<Q", 2**40) + b"x"),
    (9, struct.pack("<IQ", 4, 2) + struct.pack("<II", 1, 2)),
    (9, struct.pack("<IQ", 4, 2**40)),
    (9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 2**33)),
    (10, struct.pack("<Q", 2**64 - 1)),
    (77, b""),
)
"""Type and value of an entry, as seldom meant."""


@st.composite
def damaged_gguf(draw: st.DrawFn, parts: GgufParts) -> bytes:
    """Draw a file with some entries or tensors changed, left out or repeated."""
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 3)))):
        entries, tensors = list(parts.entries), list(parts.tensors)
        entry, tensor = (draw(st.integers(0, len(each) - 1)) for each in (entries, tensors))
        match draw(st.sampled_from(("value", "value", "value", "key", "drop", "repeat", "tensor", "tensor", "counts"))):
            case "value":
                kind, value = draw(st.sampled_from(_VALUES))
                entries[entry] = Entry(entries[entry].key, kind, value)
            case "key":
                entries[entry] = replace(entries[entry], key=draw(st.sampled_from((b"", b"\xff", b"split.count"))))
            case "drop" if len(entries) > 1:
                del entries[entry]
            case "repeat":
                entries.append(entries[entry])
            case "tensor":
                tensors[tensor] = _damaged_tensor(draw, tensors[tensor])
            case _:
                counts = st.sampled_from((0, 1, 5, 2**32, 2**64 - 1))
                parts = replace(parts, counts=(draw(counts), draw(counts)))
        parts = replace(parts, entries=tuple(entries), tensors=tuple(tensors))
    content = parts.content()
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


def _damaged_tensor(draw: st.DrawFn, tensor: TensorEntry) -> TensorEntry:
    odd = st.sampled_from((0, 1, 32, 2**31, 2**62, 2**64 - 1))
    return draw(
        st.sampled_from(
            (
                replace(tensor, name=b"\xff"),
                replace(tensor, name=b"token_embd.weight"),
                replace(tensor, name=b"rope_freqs.weight"),
                replace(tensor, dims=tuple(draw(st.lists(odd, max_size=4)))),
                replace(tensor, dims=tensor.dims[:1]),
                replace(tensor, kind=draw(st.sampled_from((0, 1, 2, 8, 14, 24, 99, 2**32 - 1)))),
                replace(tensor, offset=draw(odd)),
            )
        )
    )
