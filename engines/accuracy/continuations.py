"""Greedy continuations of a bundle and of the unquantized model, side by side, with the first point of divergence."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.perplexity import with_bos
from spike_export.engines.generation.decoding import Decoding
from spike_export.engines.generation.options import GenerationOptions


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the two write behind one prompt, always taking the most likely token.

    Attributes:
        prompt: Tokens, without BOS.
        bundle: Tokens of the bundle.
        reference: Tokens of the unquantized model, behind the same prefix.
        texts: The text of the three; empty where nobody decoded it.
    """

    prompt: tuple[int, ...]
    bundle: tuple[int, ...]
    reference: tuple[int, ...]
    texts: tuple[str, str, str] = ("", "", "")

    @property
    def divergence(self) -> int | None:
        """Index of the first token in which the two differ; None where they do not."""
        pairs = enumerate(zip(self.bundle, self.reference, strict=True))
        return next((index for index, (ours, theirs) in pairs if ours != theirs), None)


@dataclass(frozen=True)
class Continuations:
    """Continuations of several prompts.

    Attributes:
        rows: One for each prompt.
        tokens: Length of each.
    """

    rows: tuple[Continuation, ...]
    tokens: int

    @property
    def equal(self) -> int:
        """How many are the same to the end."""
        return sum(row.divergence is None for row in self.rows)

    def decoded(self, decode: Callable[[tuple[int, ...]], str]) -> "Continuations":
        """Return the same with the texts."""
        rows = (
            replace(row, texts=(decode(row.prompt), decode(row.bundle), decode(row.reference))) for row in self.rows
        )
        return replace(self, rows=tuple(rows))

    def document(self) -> dict[str, Any]:
        """Return the continuations as JSON's values."""
        rows = [{**asdict(row), "divergence": row.divergence} for row in self.rows]
        return {"format": 1, "tokens": self.tokens, "equal": self.equal, "continuations": rows}


def compare_continuations(
    runtime: Decoding,
    decoder: Decoder,
    prompts: NDArray[np.int64],
    prefix: Sequence[int],
    tokens: int,
    progress: Progress = silent,
) -> Continuations:
    """Continue prompts [prompts, tokens] without BOS greedily, by a bundle and by the unquantized model.

    Args:
        runtime: Decodes the bundle.
        decoder: The unquantized model.
        prompts: What to continue.
        prefix: Token ids of the bundle's prefix, which stands before the unquantized model's sequences too.
        tokens: Length of the continuations.
        progress: Told of the tokens of the unquantized model that are certain.

    Raises:
        EngineError: The bundle fails, or has no room for the tokens.
    """
    bos = decoder.checkpoint.bos_token_id
    fed = prompts if bos in prefix else with_bos(prompts, bos)
    options = GenerationOptions(max_new_tokens=tokens, do_sample=False)
    written = np.stack([step.tokens for step in runtime.decode(list(fed), options)], axis=1)
    expected = _greedy(decoder, fed, prefix, written, progress)
    parts = zip(*(map(_tuple, each) for each in (prompts, written, expected)), strict=True)
    return Continuations(tuple(Continuation(*row) for row in parts), tokens)


def _tuple(tokens: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(map(int, tokens))


def _greedy(
    decoder: Decoder, fed: NDArray[np.int64], prefix: Sequence[int], guess: NDArray[np.int64], progress: Progress
) -> NDArray[np.int64]:
    """Return the model's greedy continuations [rows, tokens], by Jacobi's iteration from a guess.

    A pass gives the most likely token behind every token of the guess at once, and is repeated until nothing changes.
    The first k tokens are right after k passes, whatever the guess; a good guess needs few.
    Source: Santilli et al., arXiv 2305.10427.
    """
    count = guess.shape[1]
    for passes in range(1, count + 1):
        best = _most_likely(decoder, np.concatenate([fed, guess[:, :-1]], axis=1), prefix, count)
        if np.array_equal(best, guess):
            break
        guess = best
        progress("passes", passes, count)
    return guess


def _most_likely(decoder: Decoder, tokens: NDArray[np.int64], prefix: Sequence[int], count: int) -> NDArray[np.int64]:
    """Return the most likely token behind each of the last `count` tokens, [rows, count]."""
    import torch

    states, head = decoder.run(tokens, prefix, batch_tokens=1), decoder.head()
    with torch.inference_mode():
        found = [head.logits(states.get(row)[0, -count:]).argmax(-1).cpu().numpy() for row in range(len(tokens))]
    return np.stack(found)
