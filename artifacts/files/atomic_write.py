"""Artifacts appear whole or not at all: written under a temporary name, synced, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from spike_export.artifacts.errors import ArtifactError


def describe_os_error(error: OSError, path: Path) -> str:
    """Return one line for a failed write: what failed, where, and what to do."""
    remedies = {
        errno.ENOSPC: "the disk is full; free space there or choose another place",
        errno.EFBIG: "a file of this size is not allowed here (ulimit -f); raise the limit or choose another place",
        errno.EDQUOT: "the disk quota is used up; free space there or choose another place",
        errno.EACCES: "permission denied; choose a place you may write to",
        errno.EPERM: "permission denied; choose a place you may write to",
        errno.EROFS: "the file system is read-only; choose a place you may write to",
        errno.ENOTDIR: "a part of this path is a file, not a folder; choose another place",
        errno.EEXIST: "a part of this path is a file, not a folder; choose another place",
    }
    # numpy tells only how much of an array it could write, and not why that was not all.
    cut_short = f"{error}; the disk is probably full: free space there or choose another place"
    reason = cut_short if error.errno is None else remedies.get(error.errno, error.strerror or str(error))
    return f"{path}: cannot write: {reason}"


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; what cannot be removed is overwritten or reported by the next step."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    """Flush a file, or each file of a folder, to the disk, so that the rename cannot outrun the data."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Put `temporary` in the place of the folder `path`; when that fails, `path` is as before."""
    # rename(2) cannot replace a folder that has content: the old one moves aside first.
    retired = _retired_path(path)
    _remove(retired)
    path.rename(retired)
    try:
        temporary.rename(path)
    except BaseException:
        retired.rename(path)
        raise
    _remove(retired)


def require_file_name(path: Path) -> None:
    """Refuse a place that a file cannot take because a folder is there; a folder is only ever replaced by a folder.

    Raises:
        ArtifactError: Names the folder.
    """
    if path.is_dir():
        raise ArtifactError(f"{path}: is a folder, and a file is to be written; give a file name")


def require_name(path: Path) -> None:
    """Refuse `.` and `/`: nothing can stand beside them, neither a temporary artifact nor a lock.

    Raises:
        ArtifactError: Names the folder.
    """
    if not path.name:
        raise ArtifactError(f"{path}: this folder cannot be replaced; give a name in it")


def temporary_path(path: Path) -> Path:
    """Return the name under which an artifact is written before it takes its place."""
    return path.with_name(f".{path.name}.partial")


def _retired_path(path: Path) -> Path:
    """Return the name that a folder has while another one takes its place."""
    return path.with_name(f".{path.name}.retired")


def is_half_replaced(path: Path) -> bool:
    """Return whether a process died, or is, between the two renames that replace a folder."""
    gone = bool(path.name) and not (path.is_symlink() or path.exists())
    return gone and _retired_path(path).is_dir()


def finish_replacement(path: Path) -> None:
    """Put a folder into its place where a process died between the two renames that replace a folder.

    The new folder is complete by then, under its temporary name. Where somebody has removed it, the old one comes back.

    Raises:
        ArtifactError: The folder cannot be renamed.
    """
    if not is_half_replaced(path):
        return
    temporary, retired = temporary_path(path), _retired_path(path)
    try:
        if temporary.is_dir():
            temporary.rename(path)
            _remove(retired)
        else:
            retired.rename(path)
    except OSError as error:
        raise ArtifactError(describe_os_error(error, path)) from error


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` when the block ends well.

    The block creates a file or a folder at the yielded path. A previous artifact of that name is replaced
    only then. When the block raises, the temporary is removed and the previous artifact stays.

    Args:
        path: The artifact.
        shared: Several processes may write the artifact at a time, and no lock keeps them apart: each has a temporary
            name of its own, and the last one's artifact stays. What a killed process leaves is not removed.

    Raises:
        ArtifactError: The place cannot be written to (no permission, disk full, ...), or a folder is where a file is
            to be written.
    """
    require_name(path)
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.partial") if shared else temporary_path(path)
    finish_replacement(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        _sync(temporary)
        if not temporary.is_dir():
            require_file_name(path)
        if path.is_dir():
            _replace_folder(temporary, path)
        else:
            temporary.replace(path)
    except OSError as error:
        _remove(temporary)
        raise ArtifactError(describe_os_error(error, path)) from error
    except BaseException:
        _remove(temporary)
        raise


def require_writable(folder: Path) -> None:
    """Find out now, not after hours of work, that a folder cannot be written to.

    Raises:
        ArtifactError: Names the folder and the reason.
    """
    probe = folder / ".spike-export-probe"
    with atomic_path(probe, shared=True) as temporary:
        temporary.touch()
    probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
