"""The texts that a bundle is judged on besides the calibration's kinds."""

from dataclasses import replace
from pathlib import Path

import pytest

from spike_export.artifacts.errors import CorpusError
from spike_export.calibration.corpus.corpus import PYTHON_SOURCE, python_source
from spike_export.calibration.corpus.files import CorpusOptions
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.pipeline.further_texts import further_texts
from spike_export.pipeline.job import Job
from spike_export.pipeline.run_job import run_job
from tests.support.tiny.checkpoints import random_llama, write_hf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_hf(tmp_path_factory.mktemp("model"), random_llama())))


def test_some_source_code_is_the_default(checkpoint: Checkpoint) -> None:
    (text,) = further_texts(checkpoint, CorpusOptions(), 31)
    assert (text.name, text.sha256) == (PYTHON_SOURCE, python_source().sha256)
    assert text.content.shape == (8, 31)
    assert "import" in python_source().text


def test_a_short_text_gives_no_overlapping_windows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Red, green and blue are colours of light; cyan, magenta and yellow those of ink. " * 2)
    tokens = len(path.read_text())  # a token a byte
    length = tokens // 3
    (text,) = further_texts(checkpoint, CorpusOptions(path), length)
    assert len(text.content) == tokens // length
    with pytest.raises(CorpusError, match=rf"short\.txt: {tokens} tokens; a window has {tokens + 1}"):
        further_texts(checkpoint, CorpusOptions(path), tokens + 1)


def test_what_the_bundle_is_judged_on_anyway_is_left_out(checkpoint: Checkpoint) -> None:
    assert further_texts(checkpoint, CorpusOptions(), 31, {python_source().sha256}) == ()


def test_text_of_the_model_judges_nothing(checkpoint: Checkpoint) -> None:
    with pytest.raises(CorpusError, match="--text builtin:own-text: what the model wrote is no text to judge it on"):
        further_texts(checkpoint, CorpusOptions("builtin:own-text"), 31)


def test_a_tokenizer_without_source_code_judges_on_no_default(checkpoint: Checkpoint) -> None:
    without = replace(checkpoint, tokenizer=None)
    assert further_texts(without, CorpusOptions(), 31) == ()
    with pytest.raises(CorpusError, match="no tokenizer"):
        further_texts(without, CorpusOptions("builtin:python-source"), 31)


def test_a_bad_text_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", random_llama())
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Red, green and blue. " * 50)
    job = Job(
        str(model),
        tmp_path / "run",
        calibration=CalibrationOptions(samples=2, length=32),
        corpus=CorpusOptions(corpus),
        texts=CorpusOptions(tmp_path / "missing.txt"),
    )
    with pytest.raises(CorpusError, match=r"missing\.txt"):
        run_job(job)
    assert not list((tmp_path / "run").glob("*.json"))
