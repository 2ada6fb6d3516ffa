"""Draws tokens from logits in the memory of the CPU.

First come OpenAI's logit bias, presence and frequency penalty. The filters are those of transformers'
`GenerationConfig`, in its order: repetition penalty, temperature, top k, top p, min p. Each of the last three keeps all
tokens from some least score on, so that a filter here is that score. Tokens with equal scores are kept or left out
together.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.generation.decoding import DecodedStep
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.uniform_draws import uniform_draws

Scores = NDArray[np.float32]

_SORTED_FIRST = 1024
"""Tokens that are put in order before top p needs more: usually a few dozen are needed."""


class Sampler:
    """Draws a token for each row of a batch, step after step.

    Row i draws with the generator of seed + i: what a row gets does not depend on the batch that it is in.

    Args:
        options: How to draw.
        rows: Of the batch.
    """

    def __init__(self, options: GenerationOptions, rows: int) -> None:
        self._options, self._step = options, 0
        self._draws = uniform_draws(options, rows) if options.do_sample else None
        self._counts: Scores | None = None

    def draw(
        self, logits: Scores, seen: NDArray[np.bool_] | None, allowed: NDArray[np.bool_] | None = None
    ) -> DecodedStep:
        """Draw the next token of every row; at most `max_new_tokens` times.

        The log-probabilities are of the model itself, before penalty, temperature and filters, unless the options ask
        for those behind.

        Args:
            logits: [rows, vocab]; not changed.
            seen: [rows, vocab], the tokens that each row holds (`seen_tokens`); what is drawn is added in place. None
                where there is no repetition penalty.
            allowed: [rows, vocab], the tokens that may be drawn, one of a row at least; all when omitted.
        """
        options = self._options
        scores = self._adjusted(logits)
        if seen is not None and options.repetition_penalty != 1:
            penalty = options.repetition_penalty
            scores = np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)
        if allowed is not None:
            scores = np.where(allowed, scores, np.float32(-np.inf))
        tokens = self._chosen(scores)
        self._step += 1
        rows = np.arange(len(tokens))
        if seen is not None:
            seen[rows, tokens] = True
        if self._counts is not None:
            self._counts[rows, tokens] += 1
        if options.logprobs is None:
            return DecodedStep(tokens)
        logprobs = self._logprobs(logits, scores, tokens)
        own = logprobs[rows, tokens]
        return DecodedStep(tokens, own, *most_probable(logprobs, options.logprobs) if options.logprobs else ())

    def _logprobs(self, logits: Scores, scores: Scores, tokens: NDArray[np.int64]) -> Scores:
        """Return [rows, vocab], of the model or of what tokens [rows] were drawn from."""
        if not self._options.logprobs_as_drawn:
            return log_softmax(logits)
        if self._draws is not None:
            return log_softmax(filtered(scores, self._options))
        sure = np.full_like(scores, -np.inf)
        sure[np.arange(len(tokens)), tokens] = 0
        return sure

    def _chosen(self, scores: Scores) -> NDArray[np.int64]:
        """Return [rows] tokens: the best ones, or those that are drawn."""
        if self._draws is None:
            best: NDArray[np.int64] = scores.argmax(axis=-1)
            return best
        rows = zip(scores, self._draws[self._step], strict=True)
        return np.array([_inverse(row, draw, self._options) for row, draw in rows], np.int64)

    def _adjusted(self, logits: Scores) -> Scores:
        """Return logits [rows, vocab] with bias, and with penalties for what has been drawn."""
        options, scores = self._options, logits
        if options.logit_bias:
            scores = logits.copy()
            for token, bias in options.logit_bias:
                scores[:, token] += np.float32(bias)
        if options.presence_penalty or options.frequency_penalty:
            if self._counts is None:
                self._counts = np.zeros_like(logits)
            scores = scores - options.frequency_penalty * self._counts - options.presence_penalty * (self._counts > 0)
        return scores


def seen_tokens(
    prompts: Sequence[NDArray[np.int64]], vocab: int, options: GenerationOptions
) -> NDArray[np.bool_] | None:
    """Return which tokens each prompt holds, [rows, vocab]; None where no repetition penalty asks for it."""
    if options.repetition_penalty == 1:
        return None
    seen = np.zeros((len(prompts), vocab), np.bool_)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen


def filtered(scores: Scores, options: GenerationOptions) -> Scores:
    """Return scores [rows, vocab] over the temperature, -inf where top k, top p or min p leave a token out."""
    left = np.full_like(scores, -np.inf)
    for row, own in enumerate(scores):
        tokens, kept = _kept(own, options)
        left[row, tokens] = kept
    return left


def log_softmax(scores: Scores) -> Scores:
    """Return the logarithms of the probabilities that scores [..., vocab] stand for."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    probabilities: Scores = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return probabilities


def most_probable(logprobs: Scores, count: int) -> tuple[NDArray[np.int64], Scores]:
    """Return the `count` most probable tokens of logprobs [rows, vocab] and their logprobs, best first, both [rows, k].

    k is the size of the vocabulary where `count` is more.
    """
    vocab = logprobs.shape[-1]
    first = max(0, vocab - count)
    tokens = np.argpartition(logprobs, min(first, vocab - 1), axis=-1)[:, first:]
    order = np.argsort(-np.take_along_axis(logprobs, tokens, axis=-1), axis=-1, kind="stable")
    tokens = np.take_along_axis(tokens, order, axis=-1)
    return tokens, np.take_along_axis(logprobs, tokens, axis=-1)


def _kept(scores: Scores, options: GenerationOptions) -> tuple[NDArray[np.int64], Scores]:
    """Return the tokens that top k, top p and min p leave of scores [vocab], and their scores over the temperature."""
    tokens, scores = np.arange(len(scores)), scores / np.float32(options.temperature)
    if 0 < options.top_k < len(scores):
        place = len(scores) - options.top_k
        tokens, scores = _from(np.partition(scores, place)[place], tokens, scores)
    if options.top_p < 1:
        tokens, scores = _from(_least_of_top_p(scores, options.top_p), tokens, scores)
    if options.min_p > 0:
        tokens, scores = _from(scores.max() + np.float32(np.log(options.min_p)), tokens, scores)
    return tokens, scores


def _from(least: np.float32, tokens: NDArray[np.int64], scores: Scores) -> tuple[NDArray[np.int64], Scores]:
    """Return the tokens from a score on; all of them where a score is no number."""
    kept = np.flatnonzero(~(scores < least))
    return tokens[kept], scores[kept]


def _least_of_top_p(scores: Scores, share: float) -> np.float32:
    """Return the score of the least probable token that is needed to reach a share of the probability."""
    with np.errstate(invalid="ignore"):
        parts = np.exp(scores - scores.max())
    wanted = share * float(parts.sum(dtype=np.float64))
    for first in (min(_SORTED_FIRST, len(scores)), len(scores)):
        place = len(scores) - first
        best = np.argpartition(scores, place)[place:] if place else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        reached = parts[best].cumsum(dtype=np.float64)
        if not place or reached[-1] >= wanted:
            break
    # A token is needed where those before it do not reach the share; the first always is.
    needed: np.float32 = scores[best[np.count_nonzero(reached[:-1] < wanted)]]
    return needed


def _inverse(scores: Scores, draw: float, options: GenerationOptions) -> int:
    """Return the token of scores [vocab] at which what is kept of the distribution reaches a draw in [0, 1).

    In float64: in float32 the sum over a vocabulary would lose its improbable tokens. Of logits that are not numbers
    the search finds the place behind the last token.
    """
    tokens, kept = _kept(scores, options)
    with np.errstate(invalid="ignore"):
        reached = np.exp(kept.astype(np.float64) - kept.max()).cumsum()
    place = np.searchsorted(reached, draw * reached[-1], side="right")
    return int(tokens[min(int(place), len(tokens) - 1)])
