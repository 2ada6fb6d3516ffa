"""Windows of a corpus in a model's own tokens, cut within limits of time and memory."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.process.bounded_process import Budget, BudgetError, within_budget
from spike_export.artifacts.recipe import WindowKind
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.mixture import Mixture
from spike_export.calibration.corpus.token_windows import EVALUATION_WINDOWS, TokenWindows, windows_throughout
from spike_export.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 10

_CHARACTERS_PER_SECOND = 50_000
"""Tokenizers encode about a million."""

_MEMORY = 1 << 30

_MEMORY_PER_TOKEN = 4096
"""Bytes for each token of a window: a tokenizer holds some 130 times the size of the text that it encodes at once."""

_CHARACTERS_PER_TOKEN = 16


def model_windows(
    checkpoint: Checkpoint, corpus: Corpus | Mixture, samples: int, length: int, seed: int, kind: WindowKind
) -> TokenWindows:
    """Cut windows as `token_windows` does, with the model's tokenizer and BOS.

    Raises:
        CorpusError: As `token_windows`; or the tokenizer takes too long or too much memory for a text of this size, or
            gives a token that the model has no embedding of.
    """
    mixture = corpus if isinstance(corpus, Mixture) else Mixture.of(corpus)
    cut = partial(mixture.windows, checkpoint.tokenizer, samples, length, seed, kind, checkpoint.bos_token_id)
    windows = _cut(corpus.name, cut, _budget(mixture, samples, length, kind))
    _require_known(checkpoint.config.vocab_size, corpus.name, windows.calibration)
    _require_known(checkpoint.config.vocab_size, corpus.name, windows.evaluation)
    return windows


def unseen_windows(checkpoint: Checkpoint, corpus: Corpus, length: int) -> NDArray[np.int64]:
    """Cut windows [windows, length] from a corpus that nothing was calibrated on, as `tokenizer_windows` does."""
    return tokenizer_windows(
        checkpoint.tokenizer, checkpoint.bos_token_id, checkpoint.config.vocab_size, corpus, length
    )


def tokenizer_windows(
    tokenizer: "PreTrainedTokenizerBase | None", bos: int | None, vocabulary: int, corpus: Corpus, length: int
) -> NDArray[np.int64]:
    """Cut evenly spaced windows [windows, length] from the whole of a corpus.

    As many as `EVALUATION_WINDOWS`, or as fit without an overlap.

    Raises:
        CorpusError: As `model_windows`.
    """

    def cut() -> TokenWindows:
        return windows_throughout(corpus, tokenizer, EVALUATION_WINDOWS, length, bos, overlapping=False)

    mixture = Mixture.of(corpus)
    windows = _cut(corpus.name, cut, _budget(mixture, EVALUATION_WINDOWS, length, "documents")).calibration
    _require_known(vocabulary, corpus.name, windows)
    return windows


def _cut(name: str, cut: Callable[[], TokenWindows], budget: Budget) -> TokenWindows:
    try:
        return within_budget(cut, budget)
    except BudgetError as error:
        raise CorpusError(
            f"{name}: the tokenizer {error} to encode this text; give ordinary text, or check the patterns in "
            "tokenizer.json"
        ) from error


def _require_known(vocabulary: int, name: str, windows: NDArray[np.int64]) -> None:
    if windows.max() >= vocabulary:
        raise CorpusError(
            f"{name}: the tokenizer gives token {windows.max()}, and the model knows 0 to "
            f"{vocabulary - 1}; take the tokenizer that belongs to the model"
        )


def _budget(corpus: Mixture, samples: int, length: int, kind: WindowKind) -> Budget:
    # Windows inside documents may have to look at every document.
    wanted = corpus.characters if kind == "documents" else samples * length * _CHARACTERS_PER_TOKEN
    characters = min(corpus.characters, wanted)
    return Budget(_SECONDS + characters // _CHARACTERS_PER_SECOND, _MEMORY + length * _MEMORY_PER_TOKEN)
