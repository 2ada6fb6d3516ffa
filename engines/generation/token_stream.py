"""Text of tokens that arrive one by one; no piece of it ends within a character."""

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not a whole character, or not one yet."""

_CONTEXT = 8
"""Tokens of the prompt that are decoded with the first new ones: enough to have some text among special tokens."""


class Decoder(Protocol):
    """A tokenizer's way from tokens to text, as of the package tokenizers."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Return the text of tokens."""


class TokenStream:
    """Turns one sequence's tokens into text, piece by piece.

    Decoders look at neighbours (one space less at the beginning, characters of several tokens). A piece is therefore
    what a few tokens before it and its own have as text together, less what those before it have alone; and it is held
    back while it ends in an unfinished character. The pieces, put together, are what follows the prompt's text.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._tokens = list(prompt[-_CONTEXT:])
        self._told = len(self._tokens)
        self._before = self._text(self._tokens)

    def feed(self, token: int) -> str:
        """Take the next token; return the text that is certain by now, often none."""
        self._tokens.append(token)
        text = self._text(self._tokens)
        if len(text) <= len(self._before) or text.endswith(_UNFINISHED):
            return ""
        piece = text[len(self._before) :]
        # What has just been told is the context of what comes next: it has text, so that no decoder takes it for none.
        self._tokens = self._tokens[self._told :]
        self._told = len(self._tokens)
        self._before = self._text(self._tokens)
        return piece

    def finish(self) -> str:
        """Return what was held back, now that no more tokens follow; bytes of no character as U+FFFD."""
        return self._text(self._tokens)[len(self._before) :]

    def _text(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=self._skip)
