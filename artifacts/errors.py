"""Errors a user can act on: the command line prints each as one line and exits with code 2.

A message names the thing, the place and the remedy.
"""

from spike_export.artifacts.visible_text import visible

_LONGEST_QUOTE = 400


class SpikeExportError(Exception):
    """Base of every error that bad input or a bad environment can cause; its message is one visible line.

    Names from files stand in messages, and may hold line ends or sequences that a terminal obeys.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(" ".join(message.split())))


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


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened where it rambles; with its type where it says little."""
    text = " ".join(str(error).split())
    if not text or isinstance(error, LookupError):  # whose message is a bare key
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "..."
