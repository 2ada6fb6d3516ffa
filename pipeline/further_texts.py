"""Texts of other kinds than the calibration's, on which a bundle is judged too: users send such text."""

from collections.abc import Collection
from dataclasses import replace

from spike_export.artifacts.errors import CorpusError
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.files import OWN_TEXT, SOURCE_CODE, CorpusOptions, OwnText, load_corpora
from spike_export.calibration.corpus.model_windows import unseen_windows
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.engines.accuracy.variants import Text


def further_texts(
    checkpoint: Checkpoint, options: CorpusOptions, length: int, known: Collection[str] = ()
) -> tuple[Text, ...]:
    """Return the texts with their windows; by default some source code, unless no window can be cut from it.

    Args:
        checkpoint: The model, whose tokenizer cuts the windows.
        options: The sources; none for the default.
        length: Tokens of a window, without BOS.
        known: Hashes of corpora that the bundle was calibrated or is judged on anyway; they are left out.

    Raises:
        CorpusError: A text that was given cannot be read, is the model's own, or has no window.
    """
    if options.chosen:
        return _texts(checkpoint, options, length, known)
    try:
        return _texts(checkpoint, replace(options, source=SOURCE_CODE), length, known)
    except CorpusError:  # a tokenizer that does not know such text: nobody asked for it
        return ()


def _texts(checkpoint: Checkpoint, options: CorpusOptions, length: int, known: Collection[str]) -> tuple[Text, ...]:
    found = []
    for each in load_corpora(options):
        if isinstance(each, OwnText):
            raise CorpusError(f"--text {OWN_TEXT}: what the model wrote is no text to judge it on; give another text")
        corpus = rendered(each, checkpoint.tokenizer)
        if corpus.sha256 not in known:
            found.append(Text(corpus.name, corpus.sha256, unseen_windows(checkpoint, corpus, length)))
    return tuple(found)
