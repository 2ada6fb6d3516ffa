"""One process at a time writes to a place: a lock that names its owner and ends with its owner's process."""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import (
    describe_os_error,
    finish_replacement,
    is_half_replaced,
    require_name,
)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""

_LONGEST_COMMAND = 200
"""Characters of the owner's command that are shown."""

_MOST_BYTES = 1 << 16
"""Of a lock file that are read."""


def lock_beside(path: Path) -> Path:
    """Return the lock file of an artifact that is replaced as a whole."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def sole_writer(place: Path, file: Path | None = None) -> Iterator[None]:
    """Let no other process write to a place during the block.

    The kernel holds the lock and releases it when its owner dies, by whatever signal: a lock file that a killed process
    left is taken over. On a file system without locks nothing is held.

    Args:
        place: What is written, for the message.
        file: The lock file, which is removed at the end; beside the place by default.

    Raises:
        ArtifactError: Another process writes there, and is named; or the lock file cannot be written.
    """
    if file is None:
        require_name(place)
        file = lock_beside(place)
    try:
        created = _missing_folders(file.parent)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(file, place)
    except OSError as error:
        raise ArtifactError(describe_os_error(error, place)) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder has vanished, or is read-only by now
            file.unlink()
        os.close(descriptor)
        _remove_empty(created)


def finish_dead_replacement(folder: Path) -> None:
    """Put a folder that is to be read into its place where a process died while it replaced the folder.

    Raises:
        ArtifactError: The process is alive and writes there, or the folder cannot be renamed.
    """
    if is_half_replaced(folder):
        with sole_writer(folder):
            finish_replacement(folder)


def _acquired(file: Path, place: Path) -> int:
    """Return a descriptor of the lock file; the lock lives as long as the descriptor is open."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, place)
            if _is_file_of(descriptor, file):
                _write_owner(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the former owner removed this file between the two steps above


def _lock(descriptor: int, place: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ArtifactError(
            f"{place}: in use by {_owner(descriptor)}; wait until that process has ended, or give another place"
        ) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _is_file_of(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    """Say in the lock file who holds the lock, for the message of a process that wants it too."""
    program, *arguments = sys.argv or [""]
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "command": shlex.join([Path(program).name, *arguments]),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(descriptor: int) -> str:
    """Return in words who holds the lock."""
    try:
        owner = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        command = str(owner["command"])
        shown = command if len(command) <= _LONGEST_COMMAND else command[:_LONGEST_COMMAND] + "..."
        return f"process {owner['pid']} on {owner['host']} since {owner['since']} ({shown})"
    except (ValueError, LookupError, TypeError, RecursionError):  # the owner has not written it yet
        return "another process"


def _missing_folders(folder: Path) -> list[Path]:
    """Return the folders that are to be made for a folder, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for a lock and hold nothing: what was refused leaves no trace."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
