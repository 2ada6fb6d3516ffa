"""Errors a user can act on: the command line prints each as one line and exits with code 2.

A message names the thing, the place and the remedy.
"""

from spike_export.artifacts.visible_text import visible

_LONGEST_QUOTE = 400

_LONGEST_WORD = 4096
"""Characters of the longest path that systems take: a longer word is a value out of a damaged file."""

_LONGEST_MESSAGE = 16_384


class SpikeExportError(Exception):
    """Base of every error that bad input or a bad environment can cause; its message is one visible line.

    Names and values from files stand in messages. They may hold line ends or sequences that a terminal obeys, and may
    be of any length.
    """

    def __init__(self, message: str) -> None:
        words = (word if len(word) <= _LONGEST_WORD else f"{word[:_LONGEST_QUOTE]}..." for word in message.split())
        super().__init__(_shortened(visible(" ".join(words))))


class CheckpointError(SpikeExportError):
    """The model cannot be read, or is of a kind that is not supported."""


class CorpusError(SpikeExportError):
    """The calibration or evaluation text cannot be used."""


class CalibrationError(SpikeExportError):
    """The calibration cannot go on: a value is not finite, or a module was never reached."""


class RecipeError(SpikeExportError):
    """A recipe is malformed or does not belong to the model."""


class ArtifactError(SpikeExportError):
    """An artifact cannot be written or read."""


class EngineError(SpikeExportError):
    """An engine cannot be built, loaded or run."""


def _shortened(text: str) -> str:
    """Return a message without its middle where the message is too long: the remedy stands at the end."""
    half = _LONGEST_MESSAGE // 2
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened where it rambles; with its type where it says little."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError):  # whose message is a bare key
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "..."
