"""Which bundle a plan was built from, and whether a file is the one that was written."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.manifest import DATA_FILE, GRAPH_FILE, MANIFEST_FILE
from spike_export.artifacts.progress import Progress, silent

HASHED_FILES = (GRAPH_FILE, DATA_FILE, MANIFEST_FILE)

_CHUNK = 16 << 20


def hash_bundle(bundle: Path, progress: Progress = silent) -> str:
    """Return the SHA-256 over `HASHED_FILES`, one after another, as hex.

    Raises:
        EngineError: A file is missing or cannot be read.
    """
    files = [bundle / name for name in HASHED_FILES]
    total = sum(file_size(file) for file in files)
    return _hash(files, "bytes of the bundle hashed", total, progress)


def hash_plan(plan: Path, progress: Progress = silent) -> str:
    """Return the SHA-256 of a plan's bytes, as hex.

    Raises:
        EngineError: It cannot be read.
    """
    try:
        return _hash([plan], "bytes of the plan hashed", plan.stat().st_size, progress)
    except OSError as error:
        raise EngineError(f"{plan}: cannot read the plan: {error.strerror}") from error


def _hash(files: Sequence[Path], what: str, total: int, progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress(what, done, total)
    return digest.hexdigest()


def file_size(path: Path) -> int:
    """Return the size of a bundle's file in bytes.

    Raises:
        EngineError: It is missing.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise EngineError(
            f"{path}: {error.strerror}; {path.parent} is not a complete bundle, export it again"
        ) from error
