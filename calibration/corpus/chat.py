"""Conversations, and the text that a tokenizer's chat template makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from spike_export.artifacts.errors import CorpusError, one_line
from spike_export.artifacts.process.bounded_process import BoundedProcess, Budget, BudgetError
from spike_export.calibration.corpus.corpus import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGE_KEYS = ("messages", "conversations")
"""Where records keep their messages, in the usual chat format and in ShareGPT's."""

_SHAREGPT_ROLES: Mapping[object, str] = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


BUDGET = Budget(seconds=5)
"""For the rendering of one conversation."""

LONGEST = 1 << 26
"""Characters of a rendered conversation."""


@dataclass(frozen=True)
class Message:
    """What one side said; `role` is a word that chat templates know, such as `user`."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order.

    Attributes:
        place: Where they were read, for messages of errors.
        messages: At least one.
    """

    place: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Chats:
    """A corpus of conversations, which are text only once a tokenizer's template is known.

    Attributes:
        name: What to call it in a report.
        conversations: In the source's order.
    """

    name: str
    conversations: tuple[Conversation, ...]


def conversation(messages: Sequence[object], place: str) -> Conversation:
    """Read messages, `{role, content}` each or ShareGPT's `{from, value}`.

    Args:
        messages: As a record holds them.
        place: Where the record stands.

    Raises:
        CorpusError: There are none, or one lacks its role or its text.
    """
    if not messages:
        raise CorpusError(f"{place}: a conversation without messages; remove it")
    return Conversation(place, tuple(_message(each, f"{place}, message {n}") for n, each in enumerate(messages, 1)))


def _message(value: object, place: str) -> Message:
    fields = value if isinstance(value, Mapping) else {}
    sharegpt = fields.get("role") is None and "from" in fields
    role, content = (fields.get(key) for key in (("from", "value") if sharegpt else ("role", "content")))
    if not isinstance(role, str) or not isinstance(content, str):
        raise CorpusError(f"{place}: expected text under role and content, or under from and value; correct it")
    return Message(_SHAREGPT_ROLES.get(role, role) if sharegpt else role, content)


def rendered(corpus: Corpus | Chats, tokenizer: "PreTrainedTokenizerBase | None") -> Corpus:
    """Turn conversations into documents by the tokenizer's chat template; leave a corpus that is text as it is.

    A BOS that the template puts first is taken away, because each window gets its own. Documents follow each other
    without blank lines, as turns do. Where the same token also opens every turn (SmolLM2's `<|im_start|>`), it is what
    stands between two documents.

    Raises:
        CorpusError: There is no tokenizer, it has no template, or the template refuses a conversation or takes too
            long or too much memory.
    """
    if isinstance(corpus, Corpus):
        return corpus
    if tokenizer is None:
        raise CorpusError("the checkpoint has no tokenizer, so that no chat can be rendered; add tokenizer.json")
    if not tokenizer.chat_template:
        raise CorpusError(
            "the tokenizer has no chat template; add chat_template.jinja to the model, or leave --chat-template out"
        )
    bos = tokenizer.bos_token
    with BoundedProcess(partial(_rendered, tokenizer), BUDGET) as process:
        texts = [_within_budget(process, each) for each in corpus.conversations]
    if not bos:
        return Corpus(corpus.name, tuple(texts), "")
    documents = tuple(text.removeprefix(bos) for text in texts)
    opens_turns = any(text.startswith(bos) and bos in text.removeprefix(bos) for text in texts)
    return Corpus(corpus.name, documents, bos if opens_turns else "")


def _within_budget(process: BoundedProcess[Conversation, str], chat: Conversation) -> str:
    try:
        text = process.ask(chat)
    except BudgetError as error:
        raise CorpusError(
            f"{chat.place}: the chat template {error}; correct the template, or shorten the chat"
        ) from error
    if len(text) > LONGEST:
        raise CorpusError(
            f"{chat.place}: the chat template makes more than {LONGEST:,} characters of this chat; correct the template"
        )
    return text


def _rendered(tokenizer: "PreTrainedTokenizerBase", chat: Conversation) -> str:
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except MemoryError:
        raise
    except Exception as error:  # templates raise jinja's errors, and whatever their expressions run into
        raise CorpusError(
            f"{chat.place}: the chat template refuses this conversation ({one_line(error)}); correct or remove it"
        ) from error
