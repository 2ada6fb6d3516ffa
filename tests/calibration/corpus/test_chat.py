"""Conversations become text by the tokenizer's template, with one BOS per window and not two."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from spike_export.artifacts.errors import CorpusError
from spike_export.calibration.corpus.chat import Chats, Conversation, Message, rendered
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.token_windows import token_windows
from spike_export.calibration.decoder.perplexity import with_bos
from tests.support.tiny.checkpoints import BOS, byte_tokenizer

TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
BOS_FIRST = "{{ bos_token }}" + TURNS
BOS_EACH_TURN = "{% for m in messages %}{{ bos_token }}{{ m.role }} {{ m.content }}\n{% endfor %}"
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('a user\nspeaks first') }}{% endif %}" + TURNS


def tokenizer(template: str | None, bos: str | None = "<s>") -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), bos_token=bos, chat_template=template)


def chats(*conversations: tuple[tuple[str, str], ...]) -> Chats:
    return Chats(
        "c",
        tuple(
            Conversation(f"c, line {n}", tuple(Message(role, content) for role, content in turns))
            for n, turns in enumerate(conversations, start=1)
        ),
    )


TWO = chats((("user", "Hi"), ("assistant", "Ho")), (("user", "Ja"), ("assistant", "Nein")))


def test_text_needs_no_template() -> None:
    corpus = Corpus("mine", ("a",))
    assert rendered(corpus, None) is corpus


@pytest.mark.parametrize("template", [TURNS, BOS_FIRST])
def test_conversations_are_rendered_without_the_bos_that_windows_get(template: str) -> None:
    corpus = rendered(TWO, tokenizer(template))
    assert corpus.documents == ("[user] Hi\n[assistant] Ho\n", "[user] Ja\n[assistant] Nein\n")
    assert corpus.text == "".join(corpus.documents)


def test_another_template_makes_another_corpus() -> None:
    hashes = {rendered(TWO, tokenizer(template)).sha256 for template in (TURNS, BOS_EACH_TURN, "{{ messages }}")}
    assert len(hashes) == 3


def test_a_bos_that_opens_every_turn_also_opens_the_next_conversation() -> None:
    corpus = rendered(TWO, tokenizer(BOS_EACH_TURN))
    assert corpus.documents[0] == "user Hi\n<s>assistant Ho\n"
    assert corpus.text == "user Hi\n<s>assistant Ho\n<s>user Ja\n<s>assistant Nein\n"


def test_without_a_bos_token_nothing_is_taken_away() -> None:
    assert rendered(TWO, tokenizer("<s>" + TURNS, bos=None)).documents[0].startswith("<s>[user]")


@pytest.mark.parametrize("template", [TURNS, BOS_FIRST, BOS_EACH_TURN])
@pytest.mark.parametrize("kind", ["packed", "documents"])
@pytest.mark.parametrize("seed", range(4))
def test_no_window_is_fed_two_bos(template: str, kind: Any, seed: int) -> None:
    turns = (("user", "Hello there, how are you"), ("assistant", "fine, thanks")) * 3
    tok = tokenizer(template)
    cut = token_windows(rendered(chats(*[turns] * 40), tok), tok, 16, 23, seed, kind, BOS)
    for part in (cut.calibration, cut.evaluation):
        fed = with_bos(part, BOS)
        assert not ((fed[:, :-1] == BOS) & (fed[:, 1:] == BOS)).any()


def test_special_tokens_of_a_template_become_their_ids() -> None:
    tok = tokenizer(BOS_EACH_TURN)
    cut = token_windows(rendered(TWO, tok), tok, 1, 20, 0, "packed", BOS)
    assert (cut.calibration == BOS).any()


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"no tokenizer.*add tokenizer\.json"):
        rendered(TWO, None)
    with pytest.raises(CorpusError, match=r"the tokenizer has no chat template; .* or leave --chat-template out"):
        rendered(TWO, tokenizer(None))
    wrong = chats((("user", "a"),), (("assistant", "b"),))
    with pytest.raises(CorpusError) as caught:
        rendered(wrong, tokenizer(ALTERNATING))
    assert str(caught.value) == (
        "c, line 2: the chat template refuses this conversation (a user speaks first); correct or remove it"
    )
