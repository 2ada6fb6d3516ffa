"""Log-probabilities as OpenAI's two endpoints spell them."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from spike_export.engines.generation.generated_text import TokenLogprob

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a byte that is no piece of text."""

_UNFINISHED, _NAMED = "\N{REPLACEMENT CHARACTER}", "token_id:"


class TokenText(Protocol):
    """A tokenizer's text of tokens."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Return the text of tokens."""

    def id_to_token(self, id: int) -> str | None:
        """Return how the vocabulary spells a token."""


def chat_logprob(found: TokenLogprob, text: TokenText) -> dict[str, Any]:
    """Return an entry of `logprobs.content` of a chat."""
    entry = _entry(found.token_id, found.logprob, text)
    return entry | {"top_logprobs": [_entry(token, logprob, text) for token, logprob in found.top]}


def _entry(token: int, logprob: float, text: TokenText) -> dict[str, Any]:
    word = token_word(token, text)
    content = _part_of_character(token, text) if word.startswith(_NAMED) else word.encode("utf-8", "replace")
    return {"id": token, "token": word, "logprob": logprob, "bytes": None if content is None else list(content)}


def _part_of_character(token: int, text: TokenText) -> bytes | None:
    """Return the bytes of a token that is a part of a character; None where the vocabulary does not tell them."""
    spelling = text.id_to_token(token) or ""
    if fallback := _BYTE_TOKEN.fullmatch(spelling):
        return bytes([int(fallback[1], 16)])
    try:
        return bytes(_BYTES_BY_LETTER[letter] for letter in spelling)
    except KeyError:
        return None


def _bytes_by_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves; the others are numbered from 256 on, in their order (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES_BY_LETTER = _bytes_by_letter()


def token_word(token: int, text: TokenText) -> str:
    """Return a token's text; its number where the token is a part of a character, as vLLM writes it."""
    word = text.decode([token], skip_special_tokens=False)
    return f"{_NAMED}{token}" if _UNFINISHED in word else word


class CompletionLogprobs:
    """The `logprobs` of a completion, in one piece or piece by piece: text offsets count from the text's beginning."""

    def __init__(self, text: TokenText) -> None:
        self._text, self._offset = text, 0

    def spell(self, found: Sequence[TokenLogprob | None], tokens: Sequence[int]) -> dict[str, Any]:
        """Return the entry of the next tokens; None stands for a token without one, the first of a prompt."""
        words = [self._word(token) for token in tokens]
        offsets = []
        for word in words:
            offsets.append(self._offset)
            self._offset += len(word)
        return {
            "tokens": words,
            "token_logprobs": [None if each is None else each.logprob for each in found],
            "top_logprobs": [None if each is None else self._best(each) for each in found],
            "text_offset": offsets,
        }

    def _best(self, found: TokenLogprob) -> dict[str, float]:
        """Return the most probable tokens; the drawn one is among them, as OpenAI's answers have it."""
        best = {self._word(token): logprob for token, logprob in reversed(found.top)}
        best.setdefault(self._word(found.token_id), found.logprob)
        return best

    def _word(self, token: int) -> str:
        return token_word(token, self._text)
