"""Draws tokens from logits on a device, without waiting for it: what `generation.sampling` draws on the CPU."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.generation.uniform_draws import uniform_draws


class Drawn(NamedTuple):
    """One token for every row.

    Attributes:
        tokens: [rows] int64.
        logprobs: [rows] float32, of the model itself, before penalty, temperature and filters, unless the options ask
            for those behind; None when not asked for.
        top_tokens: [rows, k] int64, the k most probable tokens, best first; None when not asked for.
        top_logprobs: [rows, k] float32, theirs.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


class Sampler:
    """Draws a token for each row of a batch, step after step, as the CPU's sampler does with the same random numbers.

    All random numbers are on the device before the first step, so that no step waits for the CPU.

    Args:
        options: How to draw.
        rows: Of the batch.
        device: Of the logits.
    """

    def __init__(self, options: GenerationOptions, rows: int, device: torch.device) -> None:
        self._options, self._step = options, 0
        self._draws = None
        if options.do_sample:
            self._draws = torch.from_numpy(uniform_draws(options, rows))[:, :, None].to(device)
        self._counts: torch.Tensor | None = None
        pairs = list(zip(*options.logit_bias, strict=True)) or [(), ()]
        self._biased = torch.tensor(pairs[0], dtype=torch.int64, device=device)
        self._biases = torch.tensor(pairs[1], dtype=torch.float32, device=device)

    def draw(self, logits: torch.Tensor, seen: torch.Tensor | None) -> Drawn:
        """Draw the next token of every row; at most `max_new_tokens` times.

        Args:
            logits: [rows, vocab] float32; not changed.
            seen: [rows, vocab] bool, the tokens that each row holds (`seen_tokens`); what is drawn is added in place.
                None where there is no repetition penalty.
        """
        options = self._options
        scores = self._adjusted(logits)
        if seen is not None and options.repetition_penalty != 1:
            penalized = torch.where(
                scores < 0, scores * options.repetition_penalty, scores / options.repetition_penalty
            )
            scores = torch.where(seen, penalized, scores)
        tokens = self._chosen(scores)
        self._step += 1
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.float32))
        if options.logprobs is None:
            return Drawn(tokens)
        logprobs = self._logprobs(logits, scores, tokens)
        own = logprobs.gather(1, tokens[:, None])[:, 0]
        if options.logprobs == 0:
            return Drawn(tokens, own)
        best = logprobs.topk(min(options.logprobs, logits.shape[-1]), dim=-1)
        return Drawn(tokens, own, best.indices, best.values)

    def _logprobs(self, logits: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return [rows, vocab], of the model or of what tokens [rows] were drawn from."""
        if not self._options.logprobs_as_drawn:
            return logits.log_softmax(dim=-1)
        if self._draws is None:
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
        return filtered(scores, self._options).log_softmax(dim=-1)

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """Return [rows] tokens: the best ones, or those that are drawn."""
        if self._draws is None:
            return scores.argmax(dim=-1)
        return _inverse(filtered(scores, self._options), self._draws[self._step])

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [rows, vocab] with bias, and with penalties for what has been drawn."""
        options, scores = self._options, logits
        if options.logit_bias:
            scores = logits.index_add(1, self._biased, self._biases.expand(len(logits), -1))
        if options.presence_penalty or options.frequency_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            scores = scores - options.frequency_penalty * self._counts - options.presence_penalty * self._counts.sign()
        return scores


def seen_tokens(
    prompts: Sequence[NDArray[np.int64]], vocab: int, options: GenerationOptions, device: torch.device
) -> torch.Tensor | None:
    """Return which tokens each prompt holds, [rows, vocab] bool; None where no repetition penalty asks for it."""
    if options.repetition_penalty == 1:
        return None
    seen = torch.zeros((len(prompts), vocab), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, torch.from_numpy(prompt)] = True
    return seen.to(device)


def filtered(scores: torch.Tensor, options: GenerationOptions) -> torch.Tensor:
    """Return scores [rows, vocab] over the temperature, -inf where top k, top p or min p leave a token out."""
    scores = scores / options.temperature
    if options.top_k:
        best = scores.topk(min(options.top_k, scores.shape[-1]), dim=-1).values
        scores = scores.masked_fill(scores < best[:, -1:], -torch.inf)
    if options.top_p < 1:
        scores = scores.masked_fill(scores < _least_of_top_p(scores, options), -torch.inf)
    if options.min_p > 0:
        least = scores.amax(dim=-1, keepdim=True) + float(np.log(options.min_p))
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def _least_of_top_p(scores: torch.Tensor, options: GenerationOptions) -> torch.Tensor:
    """Return [rows, 1], the score of the least probable token that is needed to reach the probability p.

    Behind top k only so many scores have to be put in order; equals of the k-th are counted in the total.
    """
    total, vocab = scores.logsumexp(dim=-1, keepdim=True), scores.shape[-1]
    first = min(vocab, options.top_k or vocab)
    ordered = scores.topk(first, dim=-1).values if first < vocab else scores.sort(dim=-1, descending=True).values
    reached = (ordered - total).exp().cumsum(dim=-1)
    # A token is needed where those before it do not reach p; the first always is.
    needed = 1 + (reached[:, :-1] < options.top_p).sum(dim=-1, keepdim=True)
    return ordered.gather(1, needed - 1)


def _inverse(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return [rows] tokens: the distribution's inverse at draws [rows, 1].

    In float64: in float32 the sum over a vocabulary would lose its improbable tokens. Of logits that are not numbers
    the search finds the place behind the last token, which would index memory that is not there: what the logits were
    is seen only when the tokens have arrived.
    """
    reached = scores.to(torch.float64).softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(reached, draws * reached[:, -1:], right=True)[:, 0]
    return found.clamp(max=scores.shape[-1] - 1)
