"""Windows: how they are cut, that no evaluated token was calibrated on, and what cannot be cut."""

import hashlib
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from spike_export.artifacts.errors import CorpusError
from spike_export.calibration.corpus.corpus import DEFAULT_CORPUS, Corpus, default_corpus
from spike_export.calibration.corpus.token_windows import EVALUATION_WINDOWS, TokenWindows, token_windows
from tests.support.help_topics import FIGURES_CORPUS
from tests.support.tiny.checkpoints import byte_tokenizer


class NumberingTokenizer:
    """Stands in for a fast tokenizer: a token per character, numbered through, so that a window shows its place."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self.ids: list[int] = []
        self.given = 0

    def encode(self, text: str, add_special_tokens: bool) -> "NumberingTokenizer":
        assert add_special_tokens is False
        self.ids = list(range(self.given, self.given + len(text)))
        self.given += len(text)
        return self


def windows(tokens: int, samples: int, length: int, seed: int = 0, name: str = "mine") -> TokenWindows:
    tokenizer: Any = NumberingTokenizer()
    return token_windows(Corpus(name, ("x" * tokens,)), tokenizer, samples, length, seed)


def assert_runs(cut: NDArray[np.int64], length: int) -> None:
    assert cut.shape[1] == length
    np.testing.assert_array_equal(cut, cut[:, :1] + np.arange(length))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2500), st.integers(0, 9))
def test_calibration_and_evaluation_share_no_token(length: int, samples: int, spare: int, seed: int) -> None:
    tokens = 2 * length + spare
    cut = windows(tokens, samples, length, seed)
    assert cut.calibration.shape == (samples, length)
    assert 1 <= len(cut.evaluation) <= EVALUATION_WINDOWS
    for part in (cut.calibration, cut.evaluation):
        assert_runs(part, length)
        assert part.min() >= 0
        assert part.max() < tokens
    assert cut.calibration.max() < cut.evaluation.min()
    # Evaluation windows do not overlap, and no more are dropped than must be.
    assert len(np.unique(cut.evaluation)) == cut.evaluation.size
    if tokens // 4 >= EVALUATION_WINDOWS * length:
        assert len(cut.evaluation) == EVALUATION_WINDOWS


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 9))
def test_calibration_windows_do_not_overlap_where_there_is_room(length: int, samples: int, seed: int) -> None:
    # Three quarters of these tokens are for calibration.
    cut = windows(2 * (samples + 1) * length + 8, samples, length, seed)
    assert len(np.unique(cut.calibration)) == cut.calibration.size


def test_the_seed_places_calibration_windows_only() -> None:
    first, again, other = (windows(4000, 8, 16, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.calibration, again.calibration)
    assert (first.calibration[:, 0] != other.calibration[:, 0]).any()
    np.testing.assert_array_equal(first.evaluation, other.evaluation)


def test_calibration_windows_cover_the_whole_region() -> None:
    starts = windows(40_000, 10, 100).calibration[:, 0]
    # One in each tenth of the first 30,000 tokens.
    assert (starts // 3000).tolist() == list(range(10))


def test_the_default_corpus_is_evaluated_at_fixed_places() -> None:
    cut = windows(90_000, 4, 511, name=DEFAULT_CORPUS)
    assert cut.evaluation[:, 0].tolist() == [60_000, 63_000, 66_000, 69_000, 72_000, 75_000, 78_000, 81_000]
    assert cut.calibration.max() < 60_000


@pytest.mark.parametrize(("tokens", "length"), [(81_100, 511), (90_000, 3001)])
def test_a_default_corpus_too_small_for_the_fixed_places_is_cut_as_any_other(tokens: int, length: int) -> None:
    fixed, other = windows(tokens, 4, length, name=DEFAULT_CORPUS), windows(tokens, 4, length)
    np.testing.assert_array_equal(fixed.evaluation, other.evaluation)


def test_pydoc_with_a_byte_tokenizer_has_its_fixed_places() -> None:
    corpus = default_corpus()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>")
    cut = token_windows(corpus, tokenizer, 2, 32, 0)
    # One token per byte, two special ids before them, and no BOS inserted.
    text = corpus.text.encode()
    assert bytes((cut.evaluation[1] - 2).tolist()) == text[63_000 : 63_000 + 32]
    assert cut.evaluation.min() >= 2


def test_too_short_a_corpus_says_how_long_it_must_be() -> None:
    windows(64, 1, 32)
    with pytest.raises(CorpusError) as caught:
        windows(63, 1, 32)
    assert str(caught.value) == (
        "mine: 63 tokens; calibration and evaluation need at least 64 (two windows of 32): "
        "give a longer corpus or a smaller --length"
    )


def test_a_checkpoint_without_tokenizer_is_an_error() -> None:
    with pytest.raises(CorpusError, match=r"no tokenizer.*add tokenizer\.json"):
        token_windows(Corpus("mine", ("text",)), None, 1, 2, 0)


def byte_windows(corpus: Corpus, samples: int, length: int, seed: int, kind: Literal["packed", "documents"]) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token="<s>")
    return token_windows(corpus, tokenizer, samples, length, seed, kind, 0)


GOLDEN = {
    (32, 0): "04563f8fa13eb4cee9434cc9660b1a2c63edab8fb1645e9c77b86e8d2092c412",
    (8, 3): "0af619bac0d811fac15ea8434cd85944c069146b9a66ca24d04499737f5d822b",
}
GOLDEN_EVALUATION = "60bed7cf0c6f7f4f214bd87a0a51beaf6a6b09b46fdf6d5bfb5c6ad5677b95ed"


@pytest.mark.parametrize(("samples", "seed"), GOLDEN)
def test_the_default_corpus_has_the_windows_that_the_figures_were_taken_on(samples: int, seed: int) -> None:
    corpus = default_corpus()
    if corpus.sha256 != FIGURES_CORPUS:
        pytest.skip("this Python's help topics are not those of the figures")
    cut = byte_windows(corpus, samples, 511, seed, "packed")
    assert hashlib.sha256(cut.calibration.tobytes()).hexdigest() == GOLDEN[samples, seed]
    assert hashlib.sha256(cut.evaluation.tobytes()).hexdigest() == GOLDEN_EVALUATION


def inside(lengths: list[int], samples: int, length: int, seed: int = 0) -> TokenWindows:
    tokenizer: Any = NumberingTokenizer()
    documents = tuple("x" * size for size in lengths)
    return token_windows(Corpus("mine", documents), tokenizer, samples, length, seed, "documents")


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.lists(st.integers(0, 150), max_size=20), st.integers(0, 9))
def test_windows_inside_documents_share_no_token(length: int, samples: int, lengths: list[int], seed: int) -> None:
    lengths = [*lengths, length, length + 3]
    cut = inside(lengths, samples, length, seed)
    assert cut.calibration.shape == (samples, length)
    assert 1 <= len(cut.evaluation) <= EVALUATION_WINDOWS
    ends = np.cumsum(lengths)
    for part in (cut.calibration, cut.evaluation):
        assert_runs(part, length)
        # Both ends of a window lie in the same document.
        np.testing.assert_array_equal(*(np.searchsorted(ends, part[:, edge], "right") for edge in (0, -1)))
    assert cut.calibration.max() < cut.evaluation.min()
    assert len(np.unique(cut.evaluation)) == cut.evaluation.size
    documents = [set(np.searchsorted(ends, part[:, 0], "right")) for part in (cut.calibration, cut.evaluation)]
    assert documents[0].isdisjoint(documents[1])


def test_the_seed_chooses_documents_and_places_of_calibration_only() -> None:
    first, again, other = (inside([40] * 40, 8, 16, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.calibration, again.calibration)
    np.testing.assert_array_equal(first.evaluation, other.evaluation)
    starts = [cut.calibration[:, 0] for cut in (first, other)]
    assert set(starts[0] // 40) != set(starts[1] // 40)  # other documents
    assert len(set(starts[0] % 40)) > 1  # at several places


def test_every_long_document_is_used_before_one_is_used_again() -> None:
    cut = inside([20] * 12, 18, 16)
    counts = np.bincount(cut.calibration[:, 0] // 20, minlength=12)
    assert set(counts[:9]) == {2}
    assert set(counts[9:]) == {0}
    assert set(cut.evaluation[:, 0] // 20) == {9, 10, 11}


def test_short_documents_give_no_window() -> None:
    cut = inside([5, 30, 9, 31, 2], 6, 30)
    assert set(cut.calibration[:, 0]) == {5}
    assert set(cut.evaluation[:, 0]) == {44}


@pytest.mark.parametrize(("lengths", "long"), [([100], 1), ([9, 9, 9], 0), ([9, 16, 9], 1)])
def test_too_few_long_documents_are_counted(lengths: list[int], long: int) -> None:
    with pytest.raises(CorpusError) as caught:
        inside(lengths, 4, 16)
    assert str(caught.value) == (
        f"mine: {long} of {len(lengths)} documents have 16 tokens or more; calibration and evaluation need one each: "
        "give longer documents, a smaller --length, or --windows packed"
    )


@pytest.mark.parametrize("kind", ["packed", "documents"])
@pytest.mark.parametrize("text", ["a" * 400, "\n" * 400])
def test_identical_tokens_are_refused(kind: Literal["packed", "documents"], text: str) -> None:
    corpus = Corpus("mine", (text, text), separator=text[:1])
    with pytest.raises(CorpusError, match=r"^mine: every calibration window is one token, repeated .*ordinary text$"):
        byte_windows(corpus, 4, 16, 0, kind)


def test_identical_tokens_for_evaluation_alone_are_refused() -> None:
    with pytest.raises(CorpusError, match="every evaluation window is one token, repeated"):
        byte_windows(Corpus("mine", ("abcdefgh" * 50 + "a" * 400,)), 4, 16, 0, "packed")


def test_a_corpus_that_differs_in_one_window_is_taken() -> None:
    corpus = Corpus("mine", ("a" * 99 + "b" + "a" * 100, "a" * 50 + "b" * 20))
    assert byte_windows(corpus, 2, 64, 0, "documents").calibration.shape == (2, 64)


@settings(deadline=None)
@given(st.sampled_from(["packed", "documents"]), st.integers(1, 20), st.integers(0, 9))
def test_no_window_that_has_room_begins_with_bos(kind: Literal["packed", "documents"], samples: int, seed: int) -> None:
    # Every third token is BOS, so that a window would often begin with one.
    corpus = Corpus("mine", tuple("<s>ab" * 40 + "c" for _ in range(8)), separator="")
    cut = byte_windows(corpus, samples, 20, seed, kind)
    assert (cut.calibration[:, 0] != 0).all()
    if kind == "packed":  # in documents, evaluation windows may follow each other without a token to spare
        assert (cut.evaluation[:, 0] != 0).all()
    assert (cut.calibration == 0).any()  # inside a window it stands for itself


def test_a_window_that_fills_its_document_keeps_its_bos() -> None:
    cut = byte_windows(Corpus("mine", ("<s>abcdefg", "<s>hijklmn")), 1, 8, 0, "documents")
    assert cut.calibration.tolist() == [[0, *(ord(letter) + 2 for letter in "abcdefg")]]
