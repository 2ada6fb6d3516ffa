"""Tokens of a batch turned into each row's text: pieces as they come, results when they have ended."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.generation.decoding import DecodedStep
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.stop_strings import StopStrings
from spike_export.engines.generation.token_stream import TokenStream

FinishReason = Literal["stop", "length"]
"""`stop`: a token that ends sequences, or a stop string; `length`: `max_new_tokens` are reached."""


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a token was under the model itself, before temperature, penalty and filters.

    Attributes:
        logprob: Natural logarithm of its probability.
        top: The most probable tokens in its place, best first, each with its logarithm.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to one prompt's text.

    Attributes:
        row: Which prompt, counted from 0.
        token_id: The token drawn.
        text: New text, whole characters only; empty while a character or a stop string may be unfinished.
        finish_reason: Why this was the row's last token; None where it goes on.
        logprob: None when not asked for.
    """

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Generation:
    """What followed one prompt.

    Attributes:
        text: Without special tokens; ends before a stop string.
        token_ids: All that were drawn, with the one that ended the sequence.
        prompt_tokens: How many tokens were fed, BOS included; the prefix is not counted.
        logprobs: One for each of `token_ids`; None when not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


class Row:
    """One prompt's text in progress."""

    def __init__(self, tokenizer: Any, row: int, prompt: NDArray[np.int64], options: GenerationOptions) -> None:
        self._row, self._options = row, options
        self._stream = TokenStream(tokenizer.backend_tokenizer, prompt.tolist())
        self._stops = StopStrings(options.stop_strings)
        self._count = 0
        self.ended = False

    def take(self, step: DecodedStep) -> Piece:
        """Return the piece of a step."""
        options, token = self._options, int(step.tokens[self._row])
        self._count += 1
        reason: FinishReason | None = None
        ends = token in options.eos_token_ids and not options.ignore_eos
        text = "" if ends else self._stops.feed(self._stream.feed(token))
        if self._stops.found:
            reason = "stop"
        elif ends or self._count == options.max_new_tokens:
            text += self._stops.feed(self._stream.finish())
            reason = "stop" if ends or self._stops.found else "length"
            text += self._stops.finish()
        self.ended = reason is not None
        return Piece(self._row, token, text, reason, self._logprob(step, token))

    def _logprob(self, step: DecodedStep, token: int) -> TokenLogprob | None:
        if step.logprobs is None:
            return None
        top: tuple[tuple[int, float], ...] = ()
        if step.top_tokens is not None and step.top_logprobs is not None:
            pairs = zip(step.top_tokens[self._row].tolist(), step.top_logprobs[self._row].tolist(), strict=True)
            top = tuple(pairs)
        return TokenLogprob(token, float(step.logprobs[self._row]), top)


def streamed(steps: Iterator[DecodedStep], rows: Sequence[Row]) -> Iterator[Piece]:
    """Yield what each step adds to each row that has not ended, as long as there is one; then close the steps."""
    try:
        for step in steps:
            yield from (row.take(step) for row in rows if not row.ended)
            if all(row.ended for row in rows):
                return
    finally:
        if isinstance(steps, Generator):
            steps.close()


def joined(pieces: Sequence[Piece], prompt_tokens: int) -> Generation:
    """Return a row's pieces, all of them, as one result."""
    reason = pieces[-1].finish_reason
    assert reason is not None, "a row's last piece says why it ended"
    logprobs = tuple(piece.logprob for piece in pieces if piece.logprob is not None)
    return Generation(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(piece.token_id for piece in pieces),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        logprobs=logprobs or None,
    )
