"""The file that `--config` names: found on the command line and checked before options are read from it."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.documents import read_document


def config_path(arguments: Sequence[str]) -> Path | None:
    """Return the value of `--config`, which must be known before the options are read."""
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
    return None


def require_config(path: Path, app: App) -> None:
    """Refuse a configuration file that cannot be read, by its name, which the parser's own message lacks.

    The parser checks the table of the command that runs. All other tables and keys are checked here: one that no
    command has would be ignored.

    Raises:
        ArtifactError: The file cannot be read, or names what no command has.
    """
    try:
        document = tomllib.loads(read_document(path))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read the configuration file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not TOML
        raise ArtifactError(f"{path}: not a TOML file ({error}); correct it, or leave --config out") from error
    require_text(document.values(), str(path))
    options = app.assemble_argument_collection()
    for key, value in document.items():
        _require_known(key, value, path, app, options)


def require_text(values: Iterable[Any], place: str) -> None:
    """Refuse a text that no path can hold, wherever it stands among the options.

    Raises:
        ArtifactError: Names the place and the text.
    """
    for value in values:
        if isinstance(value, str) and "\0" in value:
            raise ArtifactError(f"{place}: {value!r} holds a NUL character; correct it")
        if isinstance(value, Mapping | list):
            require_text(value.values() if isinstance(value, Mapping) else value, place)


def _require_known(key: str, value: object, path: Path, app: App, options: ArgumentCollection) -> None:
    """Refuse a table that is no command's, and a key in front of all tables that is no option of the main job."""
    commands = [name for name in app if not name.startswith("-")]
    if isinstance(value, Mapping):
        if key not in commands:
            raise ArtifactError(f"{path}: no command is named [{key}]; give one of {', '.join(commands)}")
        return
    try:
        options.match(f"--{key.replace('_', '-')}")
    except ValueError as error:
        raise ArtifactError(f"{path}: the main job has no option {key!r}; correct the key") from error
