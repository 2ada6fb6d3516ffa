"""Which bundle a plan was built from."""

import hashlib
from pathlib import Path

from spike_export.calibration.errors import EngineError
from spike_export.calibration.progress import Progress, silent
from spike_export.export.manifest import DATA_FILE, GRAPH_FILE, MANIFEST_FILE

HASHED_FILES = (GRAPH_FILE, DATA_FILE, MANIFEST_FILE)

_CHUNK = 16 << 20


def hash_bundle(bundle: Path, progress: Progress = silent) -> str:
    """Return the SHA-256 over `HASHED_FILES`, one after another, as hex.

    Raises:
        EngineError: A file is missing or cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    total = sum(file_size(bundle / name) for name in HASHED_FILES)
    for name in HASHED_FILES:
        with (bundle / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                progress("bytes of the bundle hashed", done, total)
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
