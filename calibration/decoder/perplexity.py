"""Perplexity of token windows. The first content token is never scored, so that every prefix scores the same tokens."""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import HeadScheme, SmoothingPlan
from spike_export.calibration.decoder.layerwise import Decoder, Head, Visit, batches

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


@dataclass(frozen=True)
class ReferenceStates:
    """What the unquantized model yields on some windows behind a prefix.

    Attributes:
        likelihoods: Of each window's content.
        states: Per window, the last layer's output at every `DIVERGENCE_EVERY`-th content token.
        head: Turns them into logits.
    """

    likelihoods: Sequence[Likelihood]
    states: "Sequence[torch.Tensor]"
    head: Head

    @property
    def perplexity(self) -> float:
        """Of all windows."""
        return total(self.likelihoods).perplexity


def total(likelihoods: Iterable[Likelihood]) -> Likelihood:
    """Return the sum, taken in order."""
    return reduce(operator.add, likelihoods, Likelihood(0.0, 0))


@dataclass(frozen=True, slots=True)
class WindowScore:
    """A model's predictions on one window.

    Attributes:
        likelihood: Of the content.
        divergence: KL(reference || model), the sum over `compared` tokens, in nats.
    """

    likelihood: Likelihood
    divergence: float = 0.0
    compared: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """A model's predictions on some windows.

    Attributes:
        perplexity: Of the content.
        divergence: KL(reference || model), mean over tokens, in nats; less noisy than a difference of perplexities.
    """

    perplexity: float
    divergence: float = 0.0

    @classmethod
    def of(cls, windows: Sequence[WindowScore]) -> Self:
        """Return the score of all windows; sums are taken in their order."""
        divergence = reduce(operator.add, (window.divergence for window in windows), 0.0)
        compared = max(1, sum(window.compared for window in windows))
        return cls(total(window.likelihood for window in windows).perplexity, divergence / compared)


DIVERGENCE_EVERY = 4
"""Every how many tokens one is compared with the reference: two rows of the vocabulary are costly."""


def model_perplexity(
    decoder: Decoder,
    windows: NDArray[np.int64],
    content_length: int,
    prefix: Sequence[int] = (),
    visits: Sequence[Visit] = (),
    progress: Progress = silent,
    head: HeadScheme = "unquantized",
    head_smoothing: SmoothingPlan | None = None,
) -> float:
    """Return the perplexity of the last `content_length` tokens of each window, the first of them not scored.

    Args:
        decoder: The model.
        windows: [samples, length] what the model is fed: content, with BOS before it unless the prefix holds it.
        content_length: Trailing tokens of a window that are content.
        prefix: Token ids whose key/values stand before every window.
        visits: What to do around each layer, e.g. simulate quantization.
        progress: Told after each layer.
        head: How the language-model head computes.
        head_smoothing: Of its input; heads that do not round it have none.
    """
    found = window_scores(
        decoder, windows, content_length, prefix, visits, head=head, head_smoothing=head_smoothing, progress=progress
    )
    return Score.of(found).perplexity


def reference_states(
    decoder: Decoder, windows: NDArray[np.int64], content_length: int, prefix: Sequence[int]
) -> ReferenceStates:
    """Run the unquantized model and keep what scores compare with; arguments as in `model_perplexity`."""
    likelihoods, kept, head = list[Likelihood](), [], decoder.head()
    for tokens, states in content_states(decoder, windows, content_length, prefix):
        likelihoods.append(likelihood(head, states, tokens))
        kept.append(states[::DIVERGENCE_EVERY].clone())
    return ReferenceStates(likelihoods, kept, head)


def window_scores(
    decoder: Decoder,
    windows: NDArray[np.int64],
    content_length: int,
    prefix: Sequence[int] = (),
    visits: Sequence[Visit] = (),
    *,
    head: HeadScheme = "unquantized",
    head_smoothing: SmoothingPlan | None = None,
    reference: ReferenceStates | None = None,
    progress: Progress = silent,
) -> list[WindowScore]:
    """Return each window's likelihood and, with a reference, divergence; arguments as in `model_perplexity`."""
    to_logits, found = decoder.head(head, head_smoothing), []
    content = content_states(decoder, windows, content_length, prefix, visits, progress)
    for index, (tokens, states) in enumerate(content):
        divergence, compared = 0.0, 0
        if reference is not None:
            expected = reference.states[index]
            divergence = divergence_sum(reference.head, expected, to_logits, states[::DIVERGENCE_EVERY])
            compared = len(expected)
        found.append(WindowScore(likelihood(to_logits, states, tokens), divergence, compared))
    return found


def content_states(
    decoder: Decoder,
    windows: NDArray[np.int64],
    length: int,
    prefix: Sequence[int] = (),
    visits: Sequence[Visit] = (),
    progress: Progress = silent,
) -> "Iterator[tuple[NDArray[np.int64], torch.Tensor]]":
    """Yield each window's content tokens [length] and the last layer's output there [length, hidden]."""
    states = decoder.run(windows, prefix, visits=visits, progress=progress)
    for index, batch in enumerate(batches(windows)):
        for row, tokens in zip(states.get(index), batch, strict=True):
            yield tokens[-length:], row[-length:]


def likelihood(head: Head, states: "torch.Tensor", tokens: NDArray[np.int64]) -> Likelihood:
    """Return how a window's tokens [tokens] are predicted from the last layer's output [tokens, hidden] at them."""
    import torch

    targets = torch.from_numpy(tokens[1:])
    negative = 0.0
    for start in range(0, len(targets), _HEAD_TOKENS):
        stop = min(start + _HEAD_TOKENS, len(targets))
        logits = head.logits(states[start:stop]).float().cpu()
        loss = torch.nn.functional.cross_entropy(logits, targets[start:stop], reduction="sum")
        negative += float(loss)
    return Likelihood(negative, len(targets))


def divergence_sum(reference: Head, expected_states: "torch.Tensor", head: Head, states: "torch.Tensor") -> float:
    """Return the sum over tokens of KL(reference || model), in nats; states are [tokens, hidden] of the last layer."""
    import torch

    expected = torch.log_softmax(reference.logits(expected_states).float(), -1)
    actual = torch.log_softmax(head.logits(states).float(), -1)
    return float(torch.nn.functional.kl_div(actual, expected, reduction="sum", log_target=True))
