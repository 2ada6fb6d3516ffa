"""Windows of a corpus in a model's own tokens, cut within limits of time and memory."""

from functools import partial

from spike_export.artifacts.bounded_process import Budget, BudgetError, within_budget
from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.recipe import WindowKind
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.mixture import Mixture
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.checkpoint.checkpoint import Checkpoint

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
    try:
        windows = within_budget(cut, _budget(mixture, samples, length, kind))
    except BudgetError as error:
        raise CorpusError(
            f"{corpus.name}: the tokenizer {error} to encode this text; give ordinary text, or check the patterns in "
            "tokenizer.json"
        ) from error
    largest = max(int(windows.calibration.max()), int(windows.evaluation.max()))
    if largest >= checkpoint.config.vocab_size:
        raise CorpusError(
            f"{corpus.name}: the tokenizer gives token {largest}, and the model knows 0 to "
            f"{checkpoint.config.vocab_size - 1}; take the tokenizer that belongs to the model"
        )
    return windows


def _budget(corpus: Mixture, samples: int, length: int, kind: WindowKind) -> Budget:
    # Windows inside documents may have to look at every document.
    wanted = corpus.characters if kind == "documents" else samples * length * _CHARACTERS_PER_TOKEN
    characters = min(corpus.characters, wanted)
    return Budget(_SECONDS + characters // _CHARACTERS_PER_SECOND, _MEMORY + length * _MEMORY_PER_TOKEN)
