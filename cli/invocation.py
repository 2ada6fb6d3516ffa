"""The command line that is running, for what a run records of its origin."""

from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path

COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())
"""The words, the program's name first; empty where a function was called from Python."""


def record(*folders: Path) -> None:
    """Add the command line to the log of each of some folders that is a run's work directory.

    A folder that cannot be written changes nothing of the command's result.
    """
    from spike_export.artifacts.errors import ArtifactError
    from spike_export.artifacts.results.command_log import record_command
    from spike_export.pipeline.run_directory import RunDirectory

    for folder in sorted({each.absolute() for each in folders}):
        if RunDirectory(folder).is_one:
            with suppress(ArtifactError):
                record_command(folder, COMMAND.get())
