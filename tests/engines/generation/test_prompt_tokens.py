"""Prompts with a foreign tokenizer and template: within limits, and with no word beside the result."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.bundle_tokenizer import BundleTokenizer
from spike_export.engines.generation.prompt_tokens import PromptEncoder
from tests.support.tiny.bundles import TinyModel, tiny_manifest
from tests.support.tiny.checkpoints import VOCAB, write_tokenizer

CHAT = [{"role": "user", "content": "a"}]


@pytest.fixture
def encoder(tmp_path: Path) -> Iterator[PromptEncoder]:
    write_tokenizer(tmp_path)
    manifest = tiny_manifest(TinyModel(prefix=0)).model_copy(update={"vocab_size": VOCAB, "bos_token_id": None})
    encoder = PromptEncoder(BundleTokenizer.read(tmp_path), manifest)
    yield encoder
    encoder.close()


def templated(encoder: PromptEncoder, template: str) -> PromptEncoder:
    return PromptEncoder(replace(encoder.tokenizer, templates={"default": template}), encoder.manifest)


def test_a_text_longer_than_the_model_takes_leaves_no_warning(
    encoder: PromptEncoder, capfd: pytest.CaptureFixture[str]
) -> None:
    (tokens,) = encoder.encode("a" * 1000)  # model_max_length is 256
    assert len(tokens) == 1000
    assert capfd.readouterr() == ("", "")


def test_a_template_that_fills_the_memory_is_one_line(encoder: PromptEncoder) -> None:
    bomb = templated(encoder, "{{ 'a' * 10**10 }}")
    with pytest.raises(EngineError, match="prompt 0: the bundle's chat template or tokenizer took more than 1024 MiB"):
        bomb.encode([CHAT])
    (tokens,) = templated(encoder, "{{ messages[0].content }}").encode([CHAT])
    assert len(tokens) == 1


def test_the_process_knows_what_it_was_started_with(encoder: PromptEncoder) -> None:
    started = templated(encoder, "{{ messages[0].content }}b").started()
    assert [len(tokens) for tokens in started.encode([CHAT, "abc"])] == [2, 3]
