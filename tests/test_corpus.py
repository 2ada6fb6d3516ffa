"""Corpora: what is read, what is refused and how, and that no evaluated token was calibrated on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from spike_export.calibration.corpus import (
    DEFAULT_CORPUS,
    EVALUATION_WINDOWS,
    Corpus,
    TokenWindows,
    default_corpus,
    read_corpus,
    token_windows,
)
from spike_export.calibration.errors import CorpusError
from tests.tiny_checkpoints import byte_tokenizer


class NumberingTokenizer:
    """Stands in for a fast tokenizer: token i of any text is i, so that a window shows where it was cut."""

    def __init__(self) -> None:
        self.backend_tokenizer = self
        self.ids: list[int] = []

    def encode(self, text: str, add_special_tokens: bool) -> "NumberingTokenizer":
        assert add_special_tokens is False
        self.ids = list(range(len(text)))
        return self


def windows(tokens: int, samples: int, length: int, seed: int = 0, name: str = "mine") -> TokenWindows:
    tokenizer: Any = NumberingTokenizer()
    return token_windows(Corpus(name, "x" * tokens), tokenizer, samples, length, seed)


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
        token_windows(Corpus("mine", "text"), None, 1, 2, 0)


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("ein\n\nzwei ü\n", encoding="utf-8")
    corpus = read_corpus(tmp_path / "mine.txt")
    assert corpus == Corpus("mine.txt", "ein\n\nzwei ü\n")
    assert corpus.sha256 == hashlib.sha256("ein\n\nzwei ü\n".encode()).hexdigest()


def test_documents_of_jsonl_are_separated_by_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a\nb", "other": 1}), "", json.dumps({"text": "ü"})]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_corpus(tmp_path / "mine.jsonl").text == "a\nb\n\nü"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_separator_inside_a_document_does_not_end_the_line(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert read_corpus(tmp_path / "mine.jsonl").text == text


def test_jsonl_with_windows_line_ends_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert read_corpus(tmp_path / "mine.jsonl").text == "a\n\nb"


def test_another_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "no", "content": "yes"}')
    assert read_corpus(tmp_path / "mine.jsonl", "content").text == "yes"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("mine.csv", b"text", "unknown kind of corpus; give a .txt or a .jsonl file"),
        ("mine", b"text", "unknown kind of corpus; give a .txt or a .jsonl file"),
        ("mine.txt", b"", "the corpus is empty"),
        ("mine.txt", b" \n\n ", "the corpus is empty"),
        ("mine.jsonl", b"\n\n", "the corpus is empty"),
        ("mine.jsonl", b'{"text": ""}', "the corpus is empty"),
        ("mine.txt", b"abc\xff", "not UTF-8 text (byte 3); convert the file"),
        ("mine.jsonl", b'{"text": "\xff"}', "not UTF-8 text (byte 10); convert the file"),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        read_corpus(tmp_path / file)
    assert str(caught.value) == f"{tmp_path / file}: {message}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON ("),
        ('{"body": "x"}', "line 3: no text under the key 'text'; name it with --text-field"),
        ('{"text": 5}', "line 3: no text under the key 'text'"),
        ('["text"]', "line 3: no text under the key 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    # The blank line counts, so that an editor finds the place.
    (tmp_path / "mine.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(CorpusError) as caught:
        read_corpus(tmp_path / "mine.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.jsonl'}, {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CorpusError, match="cannot read the corpus: No such file"):
        read_corpus(tmp_path / "none.txt")
    with pytest.raises(CorpusError, match="cannot read the corpus: Is a directory"):
        read_corpus(tmp_path / "folder.txt")
