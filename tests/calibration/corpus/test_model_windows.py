"""Foreign tokenizers and templates: within limits of time and memory, and only tokens that the model knows."""

import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.process.bounded_process import Budget
from spike_export.calibration.corpus import chat
from spike_export.calibration.corpus import model_windows as module
from spike_export.calibration.corpus.chat import Chats, Conversation, Message, rendered
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.model_windows import model_windows
from spike_export.calibration.corpus.token_windows import token_windows
from spike_export.checkpoint.checkpoint import Checkpoint
from tests.support.tiny.checkpoints import byte_tokenizer
from tests.support.tiny.models import tiny_llama

CORPUS = Corpus("prose", ("Where the tokens of a sentence go, the letter e follows. " * 12,))


def model(**parts: Any) -> Checkpoint:
    """Return a model of 258 tokens whose tokenizer has other parts."""
    document = json.loads(byte_tokenizer().to_str()) | parts
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)))
    checkpoint = tiny_llama().checkpoint
    return replace(checkpoint, config=replace(checkpoint.config, vocab_size=258), tokenizer=tokenizer)


def cut(checkpoint: Checkpoint) -> Any:
    return model_windows(checkpoint, CORPUS, 2, 8, 0, "packed")


def test_the_windows_are_those_of_the_tokenizer() -> None:
    checkpoint = model()
    found, expected = cut(checkpoint), token_windows(CORPUS, checkpoint.tokenizer, 2, 8, 0)
    assert found.calibration.tolist() == expected.calibration.tolist()
    assert found.evaluation.tolist() == expected.evaluation.tolist()


def word_level(**vocabulary: int) -> dict[str, Any]:
    return {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}, "pre_tokenizer": None}


def test_a_token_beyond_the_embedding_is_refused() -> None:
    known = json.loads(byte_tokenizer().to_str())["added_tokens"]
    added = [*known, known[0] | {"id": 258, "content": "the", "special": False}]
    with pytest.raises(CorpusError, match=r"prose: the tokenizer gives token 258, and the model knows 0 to 257"):
        cut(model(added_tokens=added))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (word_level(zz=5), r"Missing \[UNK\]"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["z", -1.0]]}, "pre_tokenizer": None}, "unk_id"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAEC"}}, "its native code fails"),
    ],
)
def test_a_tokenizer_that_fails_on_text(parts: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CorpusError, match=rf"^prose: the tokenizer cannot encode this text: .*{reason}"):
        cut(model(**parts))
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 1)
    slow: Any = SimpleNamespace(backend_tokenizer=SimpleNamespace(encode=lambda text, add_special_tokens: max(count())))
    with pytest.raises(CorpusError, match=r"prose: the tokenizer took more than \d+ s"):
        cut(replace(model(), tokenizer=slow))


def test_a_pattern_that_tries_for_ever_is_ended() -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(?:e|ee|[a-z ]*)*\\d"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(CorpusError, match=r"prose: the tokenizer (cannot encode this text|took more than)"):
        cut(model(pre_tokenizer=pattern))


def test_a_tokenizer_that_takes_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEMORY", 64 << 20)
    longer = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10**7}
    with pytest.raises(CorpusError, match="prose: the tokenizer took more than 64 MiB of memory"):
        cut(model(normalizer=longer))


LOOPS = "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOPS, r"took more than \d+ s"),
        ("{{ 'a' * 10**10 }}", "took more than 1024 MiB of memory"),
        ("{{ 'a' * 2000 }}", "makes more than 1,000 characters of this chat"),
    ],
)
def test_a_template_that_takes_too_much(template: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "BUDGET", Budget(seconds=1))
    monkeypatch.setattr(chat, "LONGEST", 1000)
    tokenizer: Any = model().tokenizer
    tokenizer.chat_template = template
    chats = Chats("mine", (Conversation("c.jsonl, line 1", (Message("user", "a"),)),))
    with pytest.raises(CorpusError, match=f"^c.jsonl, line 1: the chat template .*{reason}"):
        rendered(chats, tokenizer)
