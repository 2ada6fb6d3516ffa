"""Documents are read whole, and therefore only from files, and only up to a size."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from spike_export.artifacts.errors import SpikeExportError

LARGEST_DOCUMENT = 1 << 28
"""Bytes of the largest JSON, TOML or text document that is read at once: 256 MiB."""


def read_document(path: Path) -> str:
    """Return a document's text.

    Raises:
        OSError: There is no such file, the place is a pipe, a device or a folder, or the file is larger than
            `LARGEST_DOCUMENT`.
        UnicodeDecodeError: The file is not UTF-8.
    """
    require_file(path)
    if path.stat().st_size > LARGEST_DOCUMENT:
        raise OSError(errno.EFBIG, f"larger than {LARGEST_DOCUMENT >> 20} MiB", str(path))
    return path.read_text(encoding="utf-8")


def require_file(path: Path) -> None:
    """Refuse what is no file before anything opens it: a pipe would block, a device may never end.

    Raises:
        OSError: There is nothing at this place, or no file.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a path cannot hold a NUL character", str(path))
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", str(path))


def require_files(paths: Iterable[Path], error: type[SpikeExportError]) -> None:
    """Refuse a folder's entries that are neither files nor folders, before a library opens one of them.

    Raises:
        SpikeExportError: Of the given type; names the first such entry.
    """
    for path in sorted(paths):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise error(f"{path}: a pipe, socket or device, not a file; remove it")
