"""Windows of a large corpus, each encoded from an excerpt of its own.

A tokenizer holds some 130 times the size of the text that it encodes at once, and encodes about a megabyte per second:
a corpus of which the windows take a small part is not encoded whole. Places are therefore counted in characters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CorpusError
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.checkpoint.tokenizer import tokenizer_faults

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TYPICAL_CHARACTERS = 8
"""Characters per token that an excerpt is given at first: about twice those of English text."""

MOST_CHARACTERS = 128
"""Characters per token beyond which no excerpt grows: such text is no text, and would take all memory."""

_LONGEST_WORD = 200
"""Characters among which an excerpt looks for a space to begin at."""

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Excerpts:
    """Windows from anywhere in a text.

    Attributes:
        name: Of the corpus, for messages.
        read: Returns the characters from a start to a stop.
        tokenizer: Encodes them.
        length: Tokens per window, without BOS.
        bos: Id that no window begins with where it has room; None for none.
    """

    name: str
    read: Callable[[int, int], str]
    tokenizer: "Tokenizer"
    length: int
    bos: int | None

    @property
    def room(self) -> int:
        """Characters that usually hold a window, a BOS before it and a cut token behind it."""
        return TYPICAL_CHARACTERS * (self.length + 2)

    def window(self, start: int, end: int) -> Tokens | None:
        """Return the window [length] from a word's beginning at or behind `start`; None if `end` comes first.

        Raises:
            CorpusError: The text has fewer tokens than any text of that many characters.
        """
        start = self._word_start(start, end)
        size = self.room
        while True:
            stop = min(end, start + size)
            # What an excerpt's end cuts may be another token than the text has there.
            known = self._encoded(start, stop)[: None if stop == end else -1]
            shifted = known[1:] if len(known) > self.length and known[0] == self.bos else known
            if len(shifted) >= self.length:
                return shifted[: self.length]
            if stop == end:
                return None
            if size > MOST_CHARACTERS * self.length:
                raise CorpusError(
                    f"{self.name}: {size:,} characters from {start:,} on are {len(known)} tokens; give ordinary text"
                )
            size *= 2

    def _word_start(self, start: int, end: int) -> int:
        if start == 0:
            return start
        ahead = self.read(start, min(end, start + _LONGEST_WORD))
        return start + next((place for place, letter in enumerate(ahead) if letter.isspace()), 0)

    def _encoded(self, start: int, stop: int) -> Tokens:
        return encoded(self.tokenizer, self.read(start, stop), self.name)


def encoded(tokenizer: "Tokenizer", text: str, name: str) -> Tokens:
    """Return a text's tokens, without special ones; `name` is the corpus's, for messages.

    Raises:
        CorpusError: The tokenizer fails.
    """
    with tokenizer_faults(CorpusError, f"{name}: the tokenizer cannot encode this text"):
        return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


@dataclass(frozen=True)
class Wanted:
    """Which windows to cut.

    Attributes:
        samples: Calibration windows.
        evaluated: Most evaluation windows.
        share: Part of the corpus, at its end, that is for evaluation.
        length: Tokens per window, without BOS.
        seed: Places the calibration windows.
        bos: Id that no window begins with where it has room; None for none.
    """

    samples: int
    evaluated: int
    share: float
    length: int
    seed: int
    bos: int | None


def packed_windows(corpus: Corpus, tokenizer: "Tokenizer", wanted: Wanted) -> tuple[list[Tokens], list[Tokens]]:
    """Return calibration windows of a corpus's beginning, and evaluation windows of its end.

    Each lies in one of as many equal parts. Where a part is too short for a window, a calibration window may reach into
    the next part; evaluation takes fewer and longer parts.
    """
    excerpts = Excerpts(corpus.name, corpus.excerpt, tokenizer, wanted.length, wanted.bos)
    border = int(corpus.characters * (1 - wanted.share))
    generator = np.random.default_rng(wanted.seed)
    calibration = []
    for left, right in _parts(0, border, wanted.samples):
        place = left + int(generator.random() * max(0, right - left - excerpts.room))
        tried = ((place, right), (max(0, min(left, border - excerpts.room)), border), (0, border))
        calibration.append(next((w for part in tried if (w := excerpts.window(*part)) is not None), None))
    count = min(wanted.evaluated, max(1, (corpus.characters - border) // excerpts.room))
    evaluation = [excerpts.window(*part) for part in _parts(border, corpus.characters, count)]
    found = tuple([window for window in windows if window is not None] for windows in (calibration, evaluation))
    return found[0], found[1]


def _parts(start: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield `count` equal parts of the characters from `start` to `end`."""
    yield from pairwise(np.linspace(start, end, count + 1).astype(np.int64).tolist())


def windows_inside_documents(
    corpus: Corpus, tokenizer: "Tokenizer", wanted: Wanted
) -> tuple[list[Tokens], list[Tokens]]:
    """Return a window each of random documents of the first, and of evenly spaced ones of the last.

    Every document that is long enough is used before one is used again. A list is empty where no document is.
    """
    count = len(corpus.documents)
    kept = min(max(1, int(count * wanted.share)), count - 1)
    generator = np.random.default_rng(wanted.seed)
    drawn = generator.permutation(count - kept)
    calibration: list[Tokens] = []
    while len(calibration) < wanted.samples:
        found = list(_of_documents(corpus, tokenizer, wanted, drawn, wanted.samples - len(calibration), generator))
        if not found:
            break
        calibration += found
    order = count - kept + _evenly_spaced_first(kept, wanted.evaluated)
    return calibration, list(_of_documents(corpus, tokenizer, wanted, order, wanted.evaluated, None))


def _of_documents(
    corpus: Corpus,
    tokenizer: "Tokenizer",
    wanted: Wanted,
    order: NDArray[np.int64],
    most: int,
    generator: np.random.Generator | None,
) -> Iterator[Tokens]:
    """Yield a window of each document in this order that has one, at most `most`.

    It lies at a random place, or at the document's beginning without a generator.
    """
    found = 0
    for index in order.tolist():
        if found == most:
            return
        document = corpus.documents[index]
        excerpts = Excerpts(corpus.name, partial(_slice, document), tokenizer, wanted.length, wanted.bos)
        place = int(generator.random() * max(0, len(document) - excerpts.room)) if generator else 0
        window = excerpts.window(place, len(document))
        if window is None and place:
            window = excerpts.window(0, len(document))
        if window is not None:
            found += 1
            yield window


def _slice(text: str, start: int, stop: int) -> str:
    return text[start:stop]


def _evenly_spaced_first(count: int, wanted: int) -> NDArray[np.int64]:
    """Return the indices below `count`, evenly spaced ones first, so that those that follow replace what is short."""
    first = np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))
    return np.concatenate([first, np.setdiff1d(np.arange(count), first)])
