"""Perplexity of token windows. The first content token is never scored, so that every prefix scores the same tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.layerwise import Decoder, Head, Visit, batches
from spike_export.calibration.progress import Progress, silent

if TYPE_CHECKING:
    import torch

_HEAD_TOKENS = 256
"""Positions whose logits are formed at once: a vocabulary row takes 0.2 to 0.5 MB in float32."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A sum of negative log-likelihoods in nats over `tokens` predictions."""

    negative: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; infinity when it overflows."""
        try:
            return math.exp(self.negative / self.tokens)
        except OverflowError:
            return math.inf

    def __add__(self, other: "Likelihood") -> "Likelihood":
        return Likelihood(self.negative + other.negative, self.tokens + other.tokens)


def with_bos(content: NDArray[np.int64], bos_token_id: int | None) -> NDArray[np.int64]:
    """Put BOS before each window [samples, length]; unchanged when there is none."""
    if bos_token_id is None:
        return content
    return np.concatenate([np.full((len(content), 1), bos_token_id, np.int64), content], axis=1)


def model_perplexity(
    decoder: Decoder,
    windows: NDArray[np.int64],
    content_length: int,
    prefix: Sequence[int] = (),
    visits: Sequence[Visit] = (),
    progress: Progress = silent,
) -> float:
    """Return the perplexity of the last `content_length` tokens of each window, the first of them not scored.

    Args:
        decoder: The model.
        windows: [samples, length] what the model is fed: content, with BOS before it unless the prefix holds it.
        content_length: Trailing tokens of a window that are content.
        prefix: Token ids whose key/values stand before every window.
        visits: What to do around each layer, e.g. simulate quantization.
        progress: Told after each layer.
    """
    states = decoder.run(windows, prefix, visits=visits, progress=progress)
    head = decoder.head()
    total = Likelihood(0.0, 0)
    for index, batch in enumerate(batches(windows)):
        for row, tokens in zip(states.get(index), batch, strict=True):
            total += _row_likelihood(head, row[-content_length:], tokens[-content_length:])
    return total.perplexity


def _row_likelihood(head: Head, states: "torch.Tensor", tokens: NDArray[np.int64]) -> Likelihood:
    import torch

    targets = torch.from_numpy(tokens[1:])
    negative = 0.0
    for start in range(0, len(targets), _HEAD_TOKENS):
        stop = min(start + _HEAD_TOKENS, len(targets))
        logits = head.logits(states[start:stop]).float().cpu()
        loss = torch.nn.functional.cross_entropy(logits, targets[start:stop], reduction="sum")
        negative += float(loss)
    return Likelihood(negative, len(targets))
