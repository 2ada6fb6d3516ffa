"""Draws tokens from logits, on any device and without waiting for it.

First come OpenAI's logit bias, presence and frequency penalty. The filters are those of transformers'
`GenerationConfig`, in its order: repetition penalty, temperature, top k, top p, min p. Each of the last three keeps all
tokens from some least score on, so that a filter here is that score. Tokens with equal scores are kept or left out
together.
"""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spike_export.engines.generation.decoding import DecodedStep
from spike_export.engines.generation.options import GenerationOptions

_LARGEST_DRAW = 1 - 2.0**-52
"""Times any total it is less than the total, after rounding too: the inverse distribution never runs off its end."""

_SORTED_FIRST = 1024
"""Tokens that a CPU puts in order before it looks whether top p needs more: usually a few dozen are needed."""


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

    def on_host(self) -> DecodedStep:
        """Return the same as arrays; of a device other than the CPU this waits for the device."""
        logprobs, top_tokens, top_logprobs = (None if part is None else part.cpu().numpy() for part in self[1:])
        return DecodedStep(self.tokens.cpu().numpy(), logprobs, top_tokens, top_logprobs)


class Sampler:
    """Draws a token for each row of a batch, step after step.

    Row i draws with the generator of seed + i, made on the CPU: what a row gets depends neither on the batch that it is
    in nor on the device.

    Args:
        options: How to draw.
        rows: Of the batch.
        device: Of the logits.
        numpy: Let numpy look at the logits where it is faster; they have to lie in the memory of the CPU then.
    """

    def __init__(self, options: GenerationOptions, rows: int, device: torch.device, *, numpy: bool = False) -> None:
        self._numpy = numpy
        self._options, self._behind_top_k = options, replace(options, temperature=1.0, top_k=0)
        self._step = 0
        self._draws = _uniform_draws(options, rows).to(device) if options.do_sample else None
        self._counts: torch.Tensor | None = None
        pairs = list(zip(*options.logit_bias, strict=True)) or [(), ()]
        self._biased = torch.tensor(pairs[0], dtype=torch.int64, device=device)
        self._biases = torch.tensor(pairs[1], dtype=torch.float32, device=device)

    def draw(self, logits: torch.Tensor, seen: torch.Tensor | None, allowed: torch.Tensor | None = None) -> Drawn:
        """Draw the next token of every row; at most `max_new_tokens` times.

        Args:
            logits: [rows, vocab] float32; not changed.
            seen: [rows, vocab] bool, the tokens that each row holds (`seen_tokens`); what is drawn is added in place.
                None where there is no repetition penalty.
            allowed: [rows, vocab] bool, the tokens that may be drawn, one of a row at least; all when omitted.
        """
        options = self._options
        scores = self._adjusted(logits)
        if seen is not None and options.repetition_penalty != 1:
            penalized = torch.where(
                scores < 0, scores * options.repetition_penalty, scores / options.repetition_penalty
            )
            scores = torch.where(seen, penalized, scores)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
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
            # On a CPU numpy finds the best of 49,152 scores in a twentieth of torch's time.
            return torch.from_numpy(scores.numpy().argmax(axis=-1)) if self._numpy else scores.argmax(dim=-1)
        draws = self._draws[self._step]
        if not (self._numpy and self._options.top_k):
            return _inverse(filtered(scores, self._options), draws)
        rows = zip(scores.numpy(), draws, strict=True)
        return torch.cat([self._inverse_of_best(row, draw) for row, draw in rows])

    def _inverse_of_best(self, scores: NDArray[np.float32], draw: torch.Tensor) -> torch.Tensor:
        """Return [1], what `filtered` and `_inverse` draw from scores [vocab], computed for the top k alone."""
        scores = scores / np.float32(self._options.temperature)
        place = max(0, len(scores) - self._options.top_k)
        best = np.flatnonzero(~(scores < np.partition(scores, place)[place]))  # all, of what is no number
        kept = filtered(torch.from_numpy(scores[None, best]), self._behind_top_k)
        return torch.from_numpy(best)[_inverse(kept, draw[None])]

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

    Behind top k only so many scores have to be put in order; equals of the k-th are counted in the total. Without it a
    CPU, whose results need no waiting, sorts all of them only where the first few do not reach p.
    """
    total, vocab = scores.logsumexp(dim=-1, keepdim=True), scores.shape[-1]
    first = min(vocab, options.top_k or (_SORTED_FIRST if scores.device.type == "cpu" else vocab))
    ordered = scores.topk(first, dim=-1).values if first < vocab else scores.sort(dim=-1, descending=True).values
    reached = (ordered - total).exp().cumsum(dim=-1)
    if not options.top_k and first < vocab and float(reached[:, -1].min()) < options.top_p:
        ordered = scores.sort(dim=-1, descending=True).values
        reached = (ordered - total).exp().cumsum(dim=-1)
    # A token is needed where those before it do not reach p; the first always is.
    needed = 1 + (reached[:, :-1] < options.top_p).sum(dim=-1, keepdim=True)
    return ordered.gather(1, needed - 1)


def _uniform_draws(options: GenerationOptions, rows: int) -> torch.Tensor:
    """Return all that will be drawn, [max_new_tokens, rows, 1] float64 in [0, 1), so that no step waits for the CPU."""
    seed = secrets.randbits(62) if options.seed is None else options.seed
    columns = []
    for row in range(rows):
        generator = torch.Generator().manual_seed(seed + row)
        columns.append(torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(columns, dim=1)[:, :, None].clamp(max=_LARGEST_DRAW)


def _inverse(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return [rows] tokens: the distribution's inverse at draws [rows, 1].

    In float64: in float32 the sum over a vocabulary would lose its improbable tokens. Of logits that are not numbers
    the search finds the place behind the last token, which would index memory that is not there: what the logits were
    is seen only when the tokens have arrived.
    """
    reached = scores.to(torch.float64).softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(reached, draws * reached[:, -1:], right=True)[:, 0]
    return found.clamp(max=scores.shape[-1] - 1)
