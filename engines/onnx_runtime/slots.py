"""Sequences that come and go in ONNX Runtime, over either cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.generation.slots import BLOCK, KeyValues, Slots
from spike_export.engines.onnx_runtime.prefill_chunk import prefill_chunk
from spike_export.engines.onnx_runtime.sequences import Sequences, StaticSequences
from spike_export.engines.onnx_runtime.session import BundleSession

PART = 128
"""Most tokens of a prompt in one call: what the other rows wait for between two of their tokens."""


def open_slots(session: BundleSession, rows: int) -> Slots:
    """Return `rows` rows over a session that `open_for_generation` opened."""
    sequences = session.begin(rows)
    if isinstance(sequences, StaticSequences):
        return StaticSlots(sequences, min(PART, prefill_chunk(session.manifest)))
    return GrowingSlots(session, rows)


@dataclass
class StaticSlots:
    """Rows of one static cache: a step computes all of them in one call.

    The sequences lie in the first places of the buffers, whichever rows they are: a call then covers no place without
    one. When a sequence goes, the last one moves into its place.
    """

    sequences: StaticSequences
    chunk: int | None = PART
    block: int = BLOCK
    _places: list[int] = field(default_factory=list)
    """Row that each used place belongs to."""

    @property
    def rows(self) -> int:
        """See `Slots`."""
        return len(self.sequences.lengths)

    @property
    def context(self) -> int:
        """See `Slots`."""
        return self.sequences.capacity

    @property
    def longest_prompt(self) -> int:
        """See `Slots`."""
        return self.context

    @property
    def clipped(self) -> Mapping[str, tuple[int, int]]:
        """See `CountingSlots`."""
        return {} if self.sequences.clipped is None else self.sequences.clipped.counts

    def admit(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        logits = self.sequences.admit(len(self._places), tokens)
        self._places.append(row)
        return _of_one(logits)

    def extend(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        return _of_one(self.sequences.extend(self._places.index(row), tokens))

    def step(self, rows: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        places = [self._places.index(row) for row in rows]
        fed = np.zeros((max(places) + 1, 1), np.int64)
        counts = np.zeros(len(fed), np.int64)
        fed[places, 0], counts[places] = tokens, 1
        of_rows: NDArray[np.float32] = _last(self.sequences.step_first(fed, counts))[places]
        return of_rows

    def save(self, row: int, number: int) -> KeyValues:
        """See `Slots`. The first block holds the prefix too."""
        saved = self.sequences.saved(self._places.index(row), number * self.block, (number + 1) * self.block)
        return KeyValues(saved, saved.nbytes)

    def restore(self, row: int, blocks: Sequence[KeyValues]) -> None:
        """See `Slots`."""
        self.sequences.restore(len(self._places), [block.content for block in blocks])
        self._places.append(row)

    def release(self, row: int, *, spoiled: bool = False) -> None:
        """See `Slots`."""
        place, last = self._places.index(row), len(self._places) - 1
        if spoiled:
            self.sequences.clear(place)
        if place == last:
            self.sequences.release(place)
        else:
            self.sequences.move(last, place)
            self._places[place] = self._places[last]
        self._places.pop()
        self.sequences.shrink()


@dataclass
class GrowingSlots:
    """Rows with a growing cache each: such a cache has one length for all of its rows, so that each is stepped alone.

    A prompt is read in one call, because some ropes rotate it by its whole length.
    """

    session: BundleSession
    rows: int
    chunk: int | None = None
    _sequences: dict[int, Sequences] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """See `Slots`."""
        return self.session.manifest.max_position_embeddings

    @property
    def longest_prompt(self) -> int:
        """See `Slots`."""
        return self.context

    def admit(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        sequence = self.session.begin(1)
        logits = _of_one(sequence.step(tokens[None]))
        self._sequences[row] = sequence
        return logits

    def extend(self, row: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        return _of_one(self._sequences[row].step(tokens[None]))

    def step(self, rows: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `Slots`."""
        return np.stack([self.extend(row, tokens[place : place + 1]) for place, row in enumerate(rows)])

    def release(self, row: int, *, spoiled: bool = False) -> None:
        """See `Slots`."""
        del self._sequences[row]


def _last(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits [rows, vocab] of the last column of [rows, ., vocab]."""
    last: NDArray[np.float32] = logits[:, -1].astype(np.float32, copy=False)
    return last


def _of_one(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits [vocab] of the last column of a single row's [1, ., vocab]."""
    of_row: NDArray[np.float32] = _last(logits)[0]
    return of_row
