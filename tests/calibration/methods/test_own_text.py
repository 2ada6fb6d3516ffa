"""Text that the model writes itself to be calibrated on: how it begins, how much there is, and a run that uses it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from spike_export.artifacts.recipe import load_recipe
from spike_export.calibration.decoder.layerwise import Decoder, Execution
from spike_export.calibration.methods.own_text import own_corpus, unusable, write_own_text
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from tests.support.tiny.cli_models import call, write_corpus, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }};{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("own")
    write_model(place / "model")
    write_corpus(place / "corpus.txt")
    return place


def checkpoint_of(folder: Path, template: str | None) -> Checkpoint:
    checkpoint = open_checkpoint(str(folder / "model"))
    assert checkpoint.tokenizer is not None
    checkpoint.tokenizer.chat_template = template
    return checkpoint


def test_half_of_it_begins_as_a_chats_user(folder: Path) -> None:
    written = write_own_text(Decoder(checkpoint_of(folder, TEMPLATE)), 5, 24, seed=0)
    assert len(written) == 5
    # Alternating: three from BOS, two from the template, each without the BOS that windows get anyway.
    assert [text.startswith("user: ") for text in written] == [False, True, False, True, False]
    assert not any("<s>user" in text for text in written)
    assert len(set(written)) == 5


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('only tools') }}",
        "{% for message in messages %}{{ message.role }};{% endfor %}",  # drops what the user says
        "{{ 'long ' * 40 }}{{ messages[0].content }}",  # leaves the model no room
    ],
)
def test_without_a_usable_template_all_of_it_begins_with_bos(folder: Path, template: str | None) -> None:
    decoder = Decoder(checkpoint_of(folder, template))
    written = write_own_text(decoder, 3, 24, seed=0)
    assert written == write_own_text(Decoder(checkpoint_of(folder, None)), 3, 24, seed=0)
    assert len(written) == 3


def test_a_beginning_that_takes_the_tokenizer_down_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_own_text(Decoder(checkpoint_of(folder, None)), 3, 24, seed=0)
    monkeypatch.setattr("spike_export.calibration.methods.own_text.encoded", lambda *_: os.abort())
    assert write_own_text(Decoder(checkpoint_of(folder, TEMPLATE)), 3, 24, seed=0) == plain


def test_memory_bounds_how_much_is_written(folder: Path) -> None:
    checkpoint = checkpoint_of(folder, None)
    small = Decoder(checkpoint, Execution(activation_bytes=1))
    assert len(write_own_text(small, 9, 24, seed=0)) == 2
    assert write_own_text(Decoder(replace(checkpoint, tokenizer=None)), 9, 24, seed=0) == ()


def test_text_that_yields_no_window_is_told_from_text_that_does(folder: Path) -> None:
    checkpoint = checkpoint_of(folder, None)
    read_as = len(checkpoint.tokenizer.encode("word", add_special_tokens=False)) if checkpoint.tokenizer else 0
    short = unusable(own_corpus(("word",)), checkpoint, 2, read_as + 1)
    assert short is not None
    assert short.startswith(f"text by the model: {read_as} tokens; a window has {read_as + 1}")
    assert "tokens; a window has" in str(unusable(own_corpus(()), checkpoint, 2, 23))
    assert unusable(own_corpus(write_own_text(Decoder(checkpoint), 3, 24, seed=0)), checkpoint, 2, 23) is None


def test_a_run_calibrates_on_what_the_model_wrote_and_keeps_it(folder: Path) -> None:
    command = ("calibrate", folder / "model", "--work-dir", folder / "run", "--samples", "6", "--length", "24")
    mine = ("--corpus", folder / "corpus.txt", "--corpus", "builtin:own-text", "--corpus-weight", "2")
    done = call(*command, *mine, "--corpus-weight", "1", "--no-qfep")
    assert done.code == 0, done.err
    assert done.stages_run[:2] == ("own text", "spikes")
    source = load_recipe(folder / "run" / "recipe.json").corpus
    assert [(part.name, part.samples) for part in source.parts] == [("corpus.txt", 4), ("text by the model", 2)]
    lines = (folder / "run" / "own_text.jsonl").read_text(encoding="utf-8").splitlines()
    assert len([json.loads(line)["text"] for line in lines]) == 2
    assert call(*command, *mine, "--corpus-weight", "1", "--no-qfep").stages_run == ()
    # Its own file as a corpus is the same text; another seed makes another.
    other = call(*command, *mine, "--corpus-weight", "1", "--no-qfep", "--seed", "1")
    assert other.stages_run[:2] == ("own text", "spikes")
    assert (folder / "run" / "own_text.jsonl").read_text(encoding="utf-8").splitlines() != lines


def test_a_run_goes_on_without_text_that_yields_no_window(folder: Path) -> None:
    command = ("calibrate", folder / "model", "--work-dir", folder / "run", "--samples", "6", "--length", "24")
    mine = ("--corpus", folder / "corpus.txt", "--corpus-weight", "2", "--corpus", "builtin:own-text")
    (folder / "run" / "own_text.jsonl").write_text('{"text": "a"}\n')
    done = call(*command, *mine, "--corpus-weight", "1", "--no-qfep", "--no-smoothing", "--no-qfem", "--seed", "1")
    assert done.code == 0, done.err
    assert load_recipe(folder / "run" / "recipe.json").corpus.parts == ()


def test_a_model_that_is_streamed_writes_nothing(folder: Path) -> None:
    command = ("calibrate", folder / "model", "--work-dir", folder / "streamed", "--samples", "4", "--length", "24")
    mine = ("--corpus", folder / "corpus.txt", "--corpus", "builtin:own-text", "--layers", "streamed")
    done = call(*command, *mine, "--no-qfep", "--no-smoothing", "--no-qfem")
    assert done.code == 0, done.err
    assert "own text" not in done.stages_run
    assert load_recipe(folder / "streamed" / "recipe.json").corpus.parts == ()


def test_one_weight_for_two_corpora_is_refused(folder: Path) -> None:
    options = ("--corpus", folder / "corpus.txt", "--corpus", "builtin:own-text", "--corpus-weight", "2")
    error = call("calibrate", folder / "model", "--work-dir", folder / "none", *options).error
    assert "1 --corpus-weight for 2 --corpus" in error
