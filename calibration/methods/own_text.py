"""Text that the model writes itself: what it is asked and says in use, on every machine, offline.

Half of the sequences begin with BOS alone, half where the chat template expects the user's words, so that the model
writes a question and its answer.
"""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.process.bounded_process import BudgetError, within_budget
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.corpus.chat import Chats, Conversation, Message, rendered
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.excerpts import encoded
from spike_export.calibration.corpus.token_windows import windows_throughout
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.text_sampling import cache_bytes, sampled_tokens
from spike_export.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_TEXT_NAME = "text by the model"

_PLACEHOLDER = "SPIKE_EXPORT_USER"
"""Stands where the user's words go, so that the template shows what is before them."""

_FEWEST = 2
"""Sequences that are written however large their cache is: one of each beginning."""


def write_own_text(
    decoder: Decoder, sequences: int, length: int, seed: int, progress: Progress = silent
) -> tuple[str, ...]:
    """Return documents that the model wrote at temperature 1; none where nothing can begin them.

    Fewer are written where the cache of so many would take more memory than the execution allows activations.

    Args:
        decoder: The model, with its tokenizer; its layers stay in memory.
        sequences: How many to write.
        length: Tokens of each, its beginning included.
        seed: Of the draws.
        progress: Told of the tokens written.
    """
    tokenizer = decoder.checkpoint.tokenizer
    begins = _beginnings(decoder, length)
    if tokenizer is None or not begins:
        return ()
    fitting = decoder.execution.activation_bytes // cache_bytes(decoder, length)
    wanted = min(sequences, max(_FEWEST, fitting))
    # In turn, so that any stretch of the text holds all of them.
    started = [begins[index % len(begins)] for index in range(wanted)]
    rows = sampled_tokens(decoder, started, length, seed, progress)
    return tuple(_text(tokenizer, decoder.checkpoint.bos_token_id, row) for row in rows)


def own_corpus(documents: tuple[str, ...]) -> Corpus:
    """Return the documents as a corpus."""
    return Corpus(OWN_TEXT_NAME, documents)


def unusable(corpus: Corpus, checkpoint: Checkpoint, windows: int, length: int) -> str | None:
    """Return why no calibration windows of `length` tokens can be cut from what a model wrote, or None.

    A text read again may have fewer tokens than were drawn, and a broken model repeats a single one.
    """
    try:
        windows_throughout(corpus, checkpoint.tokenizer, windows, length, checkpoint.bos_token_id)
    except CorpusError as error:
        return str(error)
    return None


def _beginnings(decoder: Decoder, length: int) -> list[list[int]]:
    """Return the first tokens of what the model is to write: BOS, and a chat up to the user's words."""
    bos, tokenizer = decoder.checkpoint.bos_token_id, decoder.checkpoint.tokenizer
    found = [[bos]] if bos is not None else []
    chat = _chat_beginning(tokenizer) if tokenizer is not None else []
    return [*found, [*found[0], *chat] if found else chat] if 0 < len(chat) < length // 2 else found


def _chat_beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that a template puts between BOS and the user's words; none where it puts them nowhere."""
    chat = Conversation("the beginning of the model's own text", (Message("user", _PLACEHOLDER),))
    try:
        text = rendered(Chats(OWN_TEXT_NAME, (chat,)), tokenizer).text
        before, found, _ = text.partition(_PLACEHOLDER)
        tokens = partial(encoded, tokenizer.backend_tokenizer, before, OWN_TEXT_NAME)
        return within_budget(tokens).tolist() if found else []
    except (CorpusError, BudgetError):
        # Without a template, or a template may demand what this chat lacks, or be too much: then no chat is written.
        return []


def _text(tokenizer: "PreTrainedTokenizerBase", bos: int | None, row: NDArray[np.int64]) -> str:
    """Return a sequence as text, without the BOS that each window gets anyway."""
    return str(tokenizer.decode([int(token) for token in (row[1:] if row[0] == bos else row)]))
