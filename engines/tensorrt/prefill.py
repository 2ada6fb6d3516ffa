"""In which calls prompts enter the cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.tensorrt.limits import PlanLimits


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """One call: so many columns of so many neighbouring rows.

    Attributes:
        row: The first one.
        tokens: [rows, columns] int64.
        earlier: Columns of these rows that are in the cache already.
        ends: The last column is the last token of each of the rows.
    """

    row: int
    tokens: NDArray[np.int64]
    earlier: int
    ends: bool

    @property
    def rows(self) -> int:
        """Return how many rows."""
        return len(self.tokens)


def static_calls(prompts: Sequence[NDArray[np.int64]], limits: PlanLimits, *, together: bool) -> Iterator[PrefillCall]:
    """Yield the calls that fill a static cache: each row at its own length, without padding.

    Args:
        prompts: Per row [tokens].
        limits: The plan's.
        together: Neighbouring rows of one length may share a call.
    """
    largest = limits.prefill_batch if together else 1
    for length, members in groupby(range(len(prompts)), key=lambda row: len(prompts[row])):
        rows = list(members)
        for start in range(0, len(rows), largest):
            group = rows[start : start + largest]
            tokens = np.stack([prompts[row] for row in group])
            yield from _chunks(group[0], tokens, _column_limit(limits, length))


def dynamic_calls(prompts: Sequence[NDArray[np.int64]], limits: PlanLimits) -> Iterator[PrefillCall]:
    """Yield the calls that fill a dynamic cache: all rows in each, padded on the left with token 0."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
    yield from _chunks(0, tokens, _column_limit(limits, longest))


def _column_limit(limits: PlanLimits, columns: int) -> int:
    """Return a call's columns: as many calls as needed, of nearly one size, since a short last one would waste most."""
    calls = -(-columns // limits.call)
    return -(-columns // calls)


def _chunks(row: int, tokens: NDArray[np.int64], columns: int) -> Iterator[PrefillCall]:
    total = tokens.shape[1]
    for start in range(0, total, columns):
        yield PrefillCall(row, tokens[:, start : start + columns], start, start + columns >= total)
