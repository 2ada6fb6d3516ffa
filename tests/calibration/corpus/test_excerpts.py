"""Windows of a large corpus: where they lie, that none is shared, and what they cost."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from spike_export.artifacts.errors import CorpusError
from spike_export.calibration.corpus import token_windows as cutting
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import EVALUATION_WINDOWS, TokenWindows, token_windows
from tests.support.tiny.checkpoints import byte_tokenizer

FIRST = 0x4E00
"""Characters from here on are letters: one token each, numbered by its place in the text."""


class CharacterTokenizer:
    """Stands in for a fast tokenizer: a token per character, whose id is the character's; counts what it was given."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self.ids: list[int] = []
        self.given = 0

    def encode(self, text: str, add_special_tokens: bool) -> "CharacterTokenizer":
        assert add_special_tokens is False
        self.given += len(text)
        self.ids = [ord(letter) for letter in text]
        return self


def numbered(size: int) -> str:
    return "".join(chr(FIRST + place) for place in range(size))


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "WHOLE_CHARACTERS", 0)


def windows(corpus: Corpus, samples: int, length: int, kind: Literal["packed", "documents"], seed: int = 0) -> Any:
    tokenizer: Any = CharacterTokenizer()
    return token_windows(corpus, tokenizer, samples, length, seed, kind)


def assert_runs(cut: TokenWindows, length: int, size: int) -> None:
    for part in (cut.calibration, cut.evaluation):
        assert part.shape[1] == length
        np.testing.assert_array_equal(part, part[:, :1] + np.arange(length))
        assert part.min() >= FIRST
        assert part.max() < FIRST + size
    assert cut.calibration.max() < cut.evaluation.min()
    assert len(np.unique(cut.evaluation)) == cut.evaluation.size


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 30), st.integers(400, 9000), st.integers(0, 9), st.data())
def test_packed_windows_share_no_token(length: int, samples: int, size: int, seed: int, data: st.DataObject) -> None:
    text = numbered(size)
    border = data.draw(st.integers(0, size))
    corpus = Corpus("mine", (text[:border], text[border:]), separator="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "WHOLE_CHARACTERS", 0)
        cut = windows(corpus, samples, length, "packed", seed)
    assert cut.calibration.shape == (samples, length)
    assert_runs(cut, length, size)
    if size // 4 >= EVALUATION_WINDOWS * 8 * (length + 2):
        assert len(cut.evaluation) == EVALUATION_WINDOWS
    if size * 3 // 4 >= samples * 8 * (length + 2):  # an excerpt fits into each part
        assert len(np.unique(cut.calibration)) == cut.calibration.size


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=2, max_size=20), st.integers(2, 30), st.integers(1, 30), st.integers(0, 9)
)
def test_windows_inside_documents_share_no_token(sizes: list[int], length: int, samples: int, seed: int) -> None:
    sizes = [length, *sizes, length + 3]
    ends = np.cumsum(sizes)
    text = numbered(int(ends[-1]))
    documents = tuple(text[end - size : end] for end, size in zip(ends, sizes, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "WHOLE_CHARACTERS", 0)
        cut = windows(Corpus("mine", documents), samples, length, "documents", seed)
    assert cut.calibration.shape == (samples, length)
    assert_runs(cut, length, len(text))
    for part in (cut.calibration, cut.evaluation):
        np.testing.assert_array_equal(*(np.searchsorted(ends, part[:, edge] - FIRST, "right") for edge in (0, -1)))


def test_the_seed_places_calibration_windows_only() -> None:
    corpus = Corpus("mine", (numbered(9000),))
    first, again, other = (windows(corpus, 8, 16, "packed", seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.calibration, again.calibration)
    assert (first.calibration != other.calibration).any()
    np.testing.assert_array_equal(first.evaluation, other.evaluation)


def test_only_what_the_windows_take_is_encoded() -> None:
    tokenizer: Any = CharacterTokenizer()
    corpus = Corpus("mine", ("word " * 200_000,))
    token_windows(corpus, tokenizer, 32, 100, 0)
    assert tokenizer.given < 40 * 10 * 102


def test_a_window_begins_at_a_word() -> None:
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>")
    corpus = Corpus("mine", (" ".join(f"word{number}" for number in range(5000)),))
    cut = token_windows(corpus, tokenizer, 16, 32, 3)
    texts = [bytes((row - 2).tolist()).decode() for row in cut.calibration]
    assert all(text.startswith((" word", "word0 ")) for text in texts)


def test_the_excerpt_is_what_the_joined_text_has_there() -> None:
    corpus = Corpus("mine", ("ab", "", "cdef", "g"), separator="--")
    text = corpus.text
    assert corpus.characters == len(text)
    for start in range(len(text) + 1):
        for stop in range(start, len(text) + 2):
            assert corpus.excerpt(start, stop) == text[start:stop]
    assert Corpus("mine", ()).characters == 0


def test_text_that_makes_next_to_no_tokens_is_refused_before_it_is_all_encoded() -> None:
    class OneToken(CharacterTokenizer):
        def encode(self, text: str, add_special_tokens: bool) -> "CharacterTokenizer":
            super().encode(text, add_special_tokens)
            self.ids = self.ids[:2]
            return self

    tokenizer: Any = OneToken()
    corpus = Corpus("mine", ("x" * 100_000,))
    with pytest.raises(CorpusError, match=r"^mine: 8,320 characters from [\d,]+ on are 1 tokens; give ordinary text$"):
        token_windows(corpus, tokenizer, 1, 63, 0)


@pytest.mark.parametrize("kind", ["packed", "documents"])
def test_too_little_text_is_refused(kind: Literal["packed", "documents"]) -> None:
    with pytest.raises(CorpusError, match=r"^mine: .*give (a longer corpus|longer documents).* a smaller --length"):
        windows(Corpus("mine", ("abc", "def")), 2, 16, kind)


def test_one_document_gives_no_windows_inside_documents() -> None:
    with pytest.raises(CorpusError, match=r"^mine: one document; windows inside documents need two: give --windows"):
        windows(Corpus("mine", (numbered(9000),)), 2, 16, "documents")


@pytest.mark.parametrize("kind", ["packed", "documents"])
def test_no_window_begins_with_bos(kind: Literal["packed", "documents"]) -> None:
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>")
    corpus = Corpus("mine", tuple("<s>ab cd<s> " * 60 for _ in range(12)), separator="<s>")
    cut = token_windows(corpus, tokenizer, 8, 20, 0, kind, 0)
    assert (cut.calibration[:, 0] != 0).all()
    assert (cut.evaluation[:, 0] != 0).all()
