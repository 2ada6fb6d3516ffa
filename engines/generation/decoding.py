"""What every runtime offers: tokens drawn for a batch of prompts, step by step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import EngineError
from spike_export.engines.generation.options import GenerationOptions


@dataclass(frozen=True)
class DecodedStep:
    """One token for every row.

    Attributes:
        tokens: [rows] int64. What a row gets behind its end of sequence means nothing.
        logprobs: [rows] float32, natural logarithm of the drawn token's probability under the model itself, before
            temperature and the like; None when not asked for.
        top_tokens: [rows, k] int64, the k most probable tokens, best first; None when not asked for.
        top_logprobs: [rows, k] float32, theirs.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32] | None = None
    top_tokens: NDArray[np.int64] | None = None
    top_logprobs: NDArray[np.float32] | None = None


def require_finite(rows: NDArray[np.bool_], remedy: str) -> None:
    """Refuse a step in which an activation overflowed: a token drawn from such logits would mean nothing.

    Args:
        rows: [rows], whether all of a row's logits are finite.
        remedy: What to do about it.

    Raises:
        EngineError: Names the first row that has others.
    """
    if not rows.all():
        raise EngineError(f"row {int(rows.argmin())}: the logits are not finite, an activation overflowed; {remedy}")


class Decoding(Protocol):
    """A runtime that draws tokens: ONNX Runtime over a bundle, TensorRT over a plan."""

    def decode(self, prompts: Sequence[NDArray[np.int64]], options: GenerationOptions) -> Iterator[DecodedStep]:
        """Prefill the prompts as fresh sequences and draw a token for each row per step.

        Ends after `max_new_tokens` steps, or when the caller closes the iterator because every row has ended: tokens
        that end a sequence and stop strings are the caller's matter, since only it knows the text.

        Args:
            prompts: Per row the own tokens [tokens], at least one; of any lengths. BOS is among them where the prefix
                does not hold it.
            options: `stop_strings`, `eos_token_ids` and `ignore_eos` are not looked at.

        Raises:
            EngineError: Batch, prompt or context exceed what the runtime was built for (said before anything runs),
                or the runtime fails.
        """

    def close(self) -> None:
        """Give back what the runtime holds; it decodes no more."""
