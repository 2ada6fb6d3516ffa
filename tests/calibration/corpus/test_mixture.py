"""Several corpora: how many windows each gets, which of them judge, and what the recipe says of them."""

from pathlib import Path

import numpy as np
import pytest

from spike_export.artifacts.errors import ArtifactError, CorpusError
from spike_export.calibration.corpus.corpus import DEFAULT_CORPUS, Corpus
from spike_export.calibration.corpus.files import (
    HELP_TOPICS,
    OWN_TEXT,
    CorpusOptions,
    OwnText,
    load_corpora,
    require_judge,
)
from spike_export.calibration.corpus.mixture import Kind, Mixture, shares
from spike_export.calibration.corpus.stored_text import load_documents, save_documents
from spike_export.calibration.corpus.token_windows import EVALUATION_WINDOWS, token_windows
from tests.support.tiny.checkpoints import byte_tokenizer


class Fast:
    """What token windows need of transformers' fast tokenizer."""

    backend_tokenizer = byte_tokenizer()


LETTERS = Corpus("letters", tuple("abcdefghij" * 12 for _ in range(8)))
DIGITS = Corpus("digits", tuple("0123456789" * 12 for _ in range(8)))
SIGNS = Corpus("signs", tuple("+-*/=<>()%" * 12 for _ in range(8)))


def mixture(*weights: float) -> Mixture:
    return Mixture((Kind(LETTERS, weights[0]), Kind(DIGITS, weights[1]), Kind(SIGNS, weights[2], judges=False)))


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [
        ((1.0,), 7, (7,)),
        ((1.0, 1.0), 32, (16, 16)),
        ((2.0, 1.0, 1.0), 32, (16, 8, 8)),
        ((1.0, 1.0, 1.0), 32, (11, 11, 10)),  # what rounding leaves goes to the first of equals
        ((1.0, 1000.0), 4, (0, 4)),
    ],
)
def test_weights_share_the_windows(weights: tuple[float, ...], samples: int, expected: tuple[int, ...]) -> None:
    assert shares(weights, samples) == expected


def test_every_kind_gives_its_share_of_the_windows() -> None:
    windows = mixture(2, 1, 1).windows(Fast(), 8, 20, 0)  # type: ignore[arg-type]
    assert windows.kinds.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    alphabets = ["abcdefghij\n", "0123456789\n", "+-*/=<>()%\n"]
    for window, kind in zip(windows.calibration, windows.kinds, strict=True):
        assert set(Fast.backend_tokenizer.decode(window.tolist())) <= set(alphabets[kind])
    # Evaluation is shared by the kinds that judge, and by them alone.
    seen = [set(Fast.backend_tokenizer.decode(window.tolist())) for window in windows.evaluation]
    assert [text <= set(alphabets[0]) for text in seen] == [True] * 4 + [False] * 4
    assert [text <= set(alphabets[1]) for text in seen] == [False] * 4 + [True] * 4


def test_one_kind_is_the_corpus_itself() -> None:
    one, expected = Mixture.of(LETTERS), token_windows(LETTERS, Fast(), 6, 20, 3)  # type: ignore[arg-type]
    windows = one.windows(Fast(), 6, 20, 3)  # type: ignore[arg-type]
    np.testing.assert_array_equal(windows.calibration, expected.calibration)
    np.testing.assert_array_equal(windows.evaluation, expected.evaluation)
    assert len(windows.evaluation) == EVALUATION_WINDOWS
    assert (one.name, one.sha256, one.boundaries_sha256) == (
        LETTERS.name,
        LETTERS.sha256,
        LETTERS.boundaries_sha256,
    )
    assert one.source(6, 21, 3, "packed").parts == ()


def test_the_recipe_names_every_corpus() -> None:
    source = mixture(2, 1, 1).source(8, 21, 0, "packed")
    assert source.name == "letters + digits + signs"
    assert [(part.name, part.samples) for part in source.parts] == [("letters", 4), ("digits", 2), ("signs", 2)]
    assert [part.sha256 for part in source.parts] == [each.sha256 for each in (LETTERS, DIGITS, SIGNS)]
    other = Mixture((Kind(LETTERS), Kind(SIGNS), Kind(DIGITS)))
    assert other.sha256 != mixture(1, 1, 1).sha256  # order and text count


def test_a_kind_without_a_window_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"digits: its weight gives it none of the 4 calibration windows"):
        mixture(4, 0.1, 4).windows(Fast(), 4, 20, 0)  # type: ignore[arg-type]


def test_text_by_the_model_is_used_throughout() -> None:
    short = Mixture((Kind(LETTERS), Kind(Corpus("own", ("+-*/=<>()%" * 3,)), judges=False)))
    windows = short.windows(Fast(), 8, 20, 0)  # type: ignore[arg-type]
    starts = ["+-*/=<>()%".index(Fast.backend_tokenizer.decode(row[:1].tolist())) for row in windows.calibration[4:]]
    assert starts == [0, 3, 6, 0]  # 30 tokens: windows of 20 at 0, 3, 6 and 10
    with pytest.raises(CorpusError, match=r"own: 30 tokens; a window has 31"):
        short.windows(Fast(), 8, 31, 0)  # type: ignore[arg-type]


def test_sources_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("some text")
    options = CorpusOptions((tmp_path / "mine.txt", OWN_TEXT, HELP_TOPICS), weights=(2, 1, 1))
    mine, own, topics = load_corpora(options)
    assert isinstance(mine, Corpus)
    assert (mine.name, mine.documents) == ("mine.txt", ("some text",))
    assert own == OwnText()
    assert isinstance(topics, Corpus)
    assert topics.name == DEFAULT_CORPUS
    assert load_corpora(CorpusOptions()) == (topics, own)


@pytest.mark.parametrize(
    ("source", "weights", "message"),
    [
        (("a.txt", "b.txt"), (1.0,), r"1 --corpus-weight for 2 --corpus; give one for each, in their order"),
        (None, (1.0,), r"1 --corpus-weight for the default corpus; give one for each"),
        ("a.txt", (0.0,), r"--corpus-weight is 0.0; expected a number above 0, such as 2"),
        ("a.txt", (float("nan"),), r"--corpus-weight is nan; expected a number above 0"),
        (("a.txt", "a.txt"), (), r"--corpus a.txt is given twice; give it once, with a --corpus-weight"),
    ],
)
def test_options_that_cannot_be_meant(
    source: str | tuple[str, ...] | None, weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        CorpusOptions(source, weights=weights)


def test_own_text_alone_leaves_nothing_to_evaluate_on() -> None:
    with pytest.raises(CorpusError, match=r"builtin:own-text alone leaves no text to evaluate on; give another"):
        require_judge(load_corpora(CorpusOptions(OWN_TEXT)))


def test_stored_text_is_a_corpus(tmp_path: Path) -> None:
    path, documents = tmp_path / "own_text.jsonl", ("one\nline", 'quotes " and \u2028', "")
    save_documents(documents, path)
    assert load_documents(path) == documents
    assert load_corpora(CorpusOptions(path)) == (Corpus("own_text.jsonl", documents),)
    path.write_text('{"text": ')
    with pytest.raises(ArtifactError, match=r"own_text.jsonl: cannot read the text .*run again with --force"):
        load_documents(path)
