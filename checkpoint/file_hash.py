"""The hash of weight files, computed over several files at once."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spike_export.artifacts.threads import workers

_HASH_THREADS = 4


def hash_files(files: tuple[Path, ...]) -> str:
    """Return the SHA-256 of the files' contents, one after another, in hexadecimal."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(workers(_HASH_THREADS)) as pool:  # hashing releases the interpreter's lock
        for part in pool.map(_file_digest, files):
            digest.update(part)
    return digest.hexdigest()


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
