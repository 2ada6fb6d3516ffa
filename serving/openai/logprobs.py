"""Log-probabilities as OpenAI's two endpoints spell them."""

from collections.abc import Sequence
from typing import Any, Protocol

from spike_export.engines.generation.generated_text import TokenLogprob

_UNFINISHED, _NAMED = "\N{REPLACEMENT CHARACTER}", "token_id:"


class TokenText(Protocol):
    """A tokenizer's text of tokens."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Return the text of tokens."""


def chat_logprob(found: TokenLogprob, text: TokenText) -> dict[str, Any]:
    """Return an entry of `logprobs.content` of a chat."""
    entry = _entry(found.token_id, found.logprob, text)
    return entry | {"top_logprobs": [_entry(token, logprob, text) for token, logprob in found.top]}


def _entry(token: int, logprob: float, text: TokenText) -> dict[str, Any]:
    word = token_word(token, text)
    return {"token": word, "logprob": logprob, "bytes": None if word.startswith(_NAMED) else list(word.encode())}


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
