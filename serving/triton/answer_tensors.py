"""An answer as the output tensors of Triton's vLLM backend: in one response, or piece by piece."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.generation.generated_text import Piece, TokenLogprob
from spike_export.serving.openai.logprobs import TokenText, token_word
from spike_export.serving.triton.tensors import ADDED

Arrays = dict[str, NDArray[Any]]


@dataclass
class _Part:
    """What one sequence has had since the last response."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += 1
        self.reason = piece.finish_reason
        if piece.logprob is not None:
            self.logprobs.append(piece.logprob)


class AnswerTensors:
    """Collects pieces, and gives what they add as tensors.

    Args:
        choices: Answers to the prompt.
        prompt_tokens: Length of the prompt.
        added: Outputs besides the text.
        words: Text of tokens, for log-probabilities.
    """

    def __init__(self, choices: int, prompt_tokens: int, added: frozenset[str], words: TokenText) -> None:
        self._parts = [_Part() for _ in range(choices)]
        self._sums = [0.0] * choices
        self._prompt_tokens, self._added, self._words = prompt_tokens, added, words

    def take(self, number: int, piece: Piece) -> bool:
        """Take a piece of an answer; return whether it is worth a response of its own."""
        self._parts[number].take(piece)
        if piece.logprob is not None:
            self._sums[number] += piece.logprob.logprob
        return bool(piece.text or piece.finish_reason or "logprobs" in self._added)

    def arrays(self, prompt: str = "") -> Arrays:
        """Return what has been taken since the last call, behind the prompt."""
        parts, self._parts = self._parts, [_Part() for _ in self._parts]
        columns: Mapping[str, Sequence[Any]] = {
            "text_output": [(prompt + part.text).encode() for part in parts],
            "finish_reason": [str(part.reason).encode() for part in parts],
            "cumulative_logprob": self._sums,
            "logprobs": [self._spelled(part).encode() for part in parts],
            "num_input_tokens": [self._prompt_tokens],
            "num_output_tokens": [part.tokens for part in parts],
        }
        asked = [name for name in ADDED.values() if name in self._added]
        return {name: np.array(columns[name], _NUMPY_TYPES[name]) for name in ("text_output", *asked)}

    def _spelled(self, part: _Part) -> str:
        """Return vLLM's JSON: for each token, token id → logarithm, rank and text; the drawn token is among them."""
        return json.dumps([self._entry(each) for each in part.logprobs])

    def _entry(self, found: TokenLogprob) -> dict[int, dict[str, Any]]:
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(found.top, 1)}
        ranked.setdefault(found.token_id, (found.logprob, 0))
        return {
            token: {"logprob": logprob, "rank": rank or None, "decoded_token": token_word(token, self._words)}
            for token, (logprob, rank) in ranked.items()
        }


_NUMPY_TYPES: Mapping[str, type[Any]] = {
    "text_output": np.object_,
    "finish_reason": np.object_,
    "cumulative_logprob": np.float32,
    "logprobs": np.object_,
    "num_input_tokens": np.uint32,
    "num_output_tokens": np.uint32,
}
