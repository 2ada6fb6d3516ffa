import json
from dataclasses import replace
from pathlib import Path

import pytest

from spike_export.artifacts.errors import CheckpointError
from spike_export.checkpoint.hf_directory import open_hf_directory
from tests.support.tiny.checkpoints import random_llama, write_hf
from tests.support.tiny.models import tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "model", random_llama(num_hidden_layers=1))


def test_a_tokenizer_written_in_python_is_refused(model: Path) -> None:
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(CheckpointError, match=r"ByT5Tokenizer has no form as tokenizer\.json; convert the tokenizer"):
        open_hf_directory(model, "model")


def test_a_panic_is_one_line_and_no_word_beside_it(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    document = json.loads((model / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQ=="}
    (model / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="cannot load the tokenizer: its native code fails"):
        open_hf_directory(model, "model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_max_length", "many", "not supported between instances of 'int' and 'str'"),
        ("chat_template", 5, "the chat template is of the type int, not a text"),
        ("chat_template", {"default": 5}, "the chat template is of the type int, not a text"),
        ("chat_template", "\ud800", "surrogates not allowed"),
        ("anything", "\ud800", "surrogates not allowed"),
    ],
)
def test_a_value_that_only_use_finds_out_is_refused_at_the_beginning(
    model: Path, key: str, value: object, said: str
) -> None:
    configuration = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(configuration | {key: value}))
    with pytest.raises(CheckpointError, match=f"cannot load the tokenizer: .*{said}"):
        open_hf_directory(model, "model")


@pytest.mark.parametrize("bos", [99, -7])
def test_a_bos_that_has_no_embedding_is_refused(bos: int) -> None:
    checkpoint = tiny_llama().checkpoint
    with pytest.raises(CheckpointError, match=f"begin with token {bos}, and the model knows 0 to 98"):
        replace(checkpoint, config=replace(checkpoint.config, bos_token_id=bos))
