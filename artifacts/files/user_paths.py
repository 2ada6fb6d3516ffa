"""Paths as users write them, with `~` for a home folder."""

from pathlib import Path

from spike_export.artifacts.errors import SpikeExportError


def user_path(text: str, error: type[SpikeExportError]) -> Path:
    """Return the path that a user means.

    Args:
        text: As it was given.
        error: What to raise.

    Raises:
        SpikeExportError: Of that type: the path begins with the home folder of a user who is not known here, or holds a
            NUL character.
    """
    if "\0" in text:
        raise error(f"{text!r}: a path cannot hold a NUL character; correct it")
    try:
        return Path(text).expanduser()
    except RuntimeError as unknown:
        raise error(f"{text}: there is no such home folder; write the path without ~") from unknown
