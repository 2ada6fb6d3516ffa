"""A fault of the program: one line for the user, and a file with the traceback for whoever mends the program."""

import platform
import tempfile
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path

from spike_export.artifacts.errors import one_line
from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.messages import say

PACKAGES = ("spike-export", "torch", "transformers", "onnxruntime", "onnxruntime-gpu")


def report_crash(error: BaseException, folder: Path | None, *, debug: bool) -> None:
    """Write the traceback to a new file, and say on standard error where the file is.

    Args:
        error: What no part of the program expected.
        folder: The command's work directory; None for a command without one. The folder for temporary files is taken
            where this one cannot be written.
        debug: Print the traceback as well. Where no file can be written, the traceback is printed in any case.
    """
    file = _written(error, [*([folder] if folder else []), Path(tempfile.gettempdir())])
    if debug or file is None:
        traceback.print_exception(error)
    place = f"the traceback is in {file}" if file else "the traceback is above, no file could be written"
    say(f"this is a fault of the program, not of its input ({_described(error)}); {place}")


def _described(error: BaseException) -> str:
    kind, text = type(error).__name__, one_line(error)
    return visible(text if text.startswith(kind) else f"{kind}: {text}")


def _written(error: BaseException, folders: list[Path]) -> Path | None:
    for folder in folders:
        try:
            return _write_new(_document(error), folder)
        except Exception:  # a full disk, no permission, no memory: the user still gets the line
            continue
    return None


def _write_new(text: str, folder: Path) -> Path:
    """Write a text under a name that is not taken yet; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _names(folder, datetime.now(UTC)):
        try:
            with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise AssertionError("the names never end")


def _names(folder: Path, now: datetime) -> Iterator[Path]:
    stem = f"crash-{now:%Y%m%d-%H%M%S}"
    yield folder / f"{stem}.txt"
    yield from (folder / f"{stem}-{number}.txt" for number in count(2))


def _document(error: BaseException) -> str:
    """Return versions and traceback. Neither the environment nor the values of variables are in the text."""
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    facts = [*versions, f"Python {platform.python_version()}", f"platform {platform.platform()}"]
    return "\n".join(facts) + "\n\n" + "".join(traceback.format_exception(error))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
