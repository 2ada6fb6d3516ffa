"""The command lines that made what is in a work directory, with the versions of the tools, for the report."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.json_document import load_document

COMMANDS_FILE = "commands.json"

_MOST = 20
"""Commands that are kept, the last ones."""

_TOOLS = ("spike-export", "torch", "transformers", "onnxruntime", "numpy", "tensorrt", "tensorrt-rtx-cu13")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Command(_Part):
    """One call of the command line.

    Attributes:
        words: The command line, word by word.
        versions: Tool → version; tools that are not installed are left out.
    """

    words: tuple[str, ...]
    versions: dict[str, str]


class CommandLog(_Part):
    """What `commands.json` holds: the latest commands, each once, the last one last."""

    format: int = 1
    commands: tuple[Command, ...] = ()


def record_command(run: Path, words: tuple[str, ...]) -> None:
    """Add a command to a work directory's log; nothing where no command line was given.

    Raises:
        ArtifactError: The log cannot be written.
    """
    if not words:
        return
    path = run / COMMANDS_FILE
    try:
        before = load_commands(path).commands if path.exists() else ()
    except ArtifactError:
        before = ()
    kept = [each for each in before if each.words != words]
    log = CommandLog(commands=(*kept, Command(words=words, versions=installed_versions()))[-_MOST:])
    write_text(path, log.model_dump_json(indent=1) + "\n")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_commands(path: Path) -> CommandLog:
    """Read `commands.json`.

    Raises:
        ArtifactError: The file cannot be read, or is none.
    """
    return load_document(path, CommandLog, "delete the file")
