"""Texts that a model writes behind the contexts of tasks: greedy, and up to the first of some strings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.generation.generated_text import Generation
from spike_export.engines.generation.options import GenerationOptions
from spike_export.engines.tasks.token_rows import Tokens

_ROWS = 16
"""Contexts that are continued together."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A text that is asked for.

    Attributes:
        context: What the model is fed, at least one token.
        stops: The text ends before the first of these strings.
        tokens: Most tokens of the text.
    """

    context: Tokens
    stops: tuple[str, ...]
    tokens: int

    @property
    def options(self) -> GenerationOptions:
        """How the text is written; what ends a sequence is the bundle's to say."""
        return GenerationOptions(max_new_tokens=self.tokens, stop_strings=self.stops)


Generate = Callable[[list[list[int]], GenerationOptions], list[Generation]]
"""Prompts of tokens, and how each goes on → what follows them."""

Write = Callable[[Sequence[TextRequest]], list[str]]
"""Returns the text behind each context."""


def written(generate: Generate, requests: Sequence[TextRequest], progress: Progress = silent) -> list[str]:
    """Return the text that a model writes behind each context; contexts of like length are continued together.

    Args:
        generate: The model.
        requests: What is asked for.
        progress: Told of the texts after each batch.

    Raises:
        EngineError: The model fails.
    """
    texts: dict[int, str] = {}
    for batch in _batches(requests):
        found = generate([list(requests[index].context) for index in batch], requests[batch[0]].options)
        texts |= {index: each.text for index, each in zip(batch, found, strict=True)}
        progress("texts", len(texts), len(requests))
    return [texts[index] for index in range(len(requests))]


def _batches(requests: Sequence[TextRequest]) -> list[list[int]]:
    """Return the places of requests that are written alike, the longest contexts first."""
    alike: dict[GenerationOptions, list[int]] = {}
    for index in sorted(range(len(requests)), key=lambda index: -len(requests[index].context)):
        alike.setdefault(requests[index].options, []).append(index)
    return [group[start : start + _ROWS] for group in alike.values() for start in range(0, len(group), _ROWS)]
