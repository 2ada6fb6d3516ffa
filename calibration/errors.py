"""Errors a user can act on: the command line prints each as one line and exits with code 2.

A message names the thing, the place and the remedy.
"""


class SpikeExportError(Exception):
    """Base of every error that bad input or a bad environment can cause."""


class CheckpointError(SpikeExportError):
    """The model cannot be read, or is of a kind that is not supported."""


class CorpusError(SpikeExportError):
    """The calibration or evaluation text cannot be used."""


class RecipeError(SpikeExportError):
    """A recipe is malformed or does not belong to the model."""


class ArtifactError(SpikeExportError):
    """An artifact cannot be written or read."""


class EngineError(SpikeExportError):
    """An engine cannot be built, loaded or run."""
