"""The hash of weight files, computed over several files at once, and whether they are still the files of that hash."""

import hashlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from spike_export.artifacts.errors import CheckpointError
from spike_export.artifacts.process.threads import workers

_HASH_THREADS = 4


@dataclass(frozen=True, slots=True)
class HashedFiles:
    """Weight files and their hash.

    Attributes:
        sha256: Of their contents, one after another, in hexadecimal.
        states: What the file system said of each file before it was hashed.
    """

    files: tuple[Path, ...]
    sha256: str
    states: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def of(cls, files: tuple[Path, ...]) -> Self:
        """Hash files."""
        states = tuple(_state(file) for file in files)
        return cls(files, hash_files(files), states)

    def require_unchanged(self) -> None:
        """See, without reading them, that the files are those that were hashed.

        Raises:
            CheckpointError: Names the first file that is not.
        """
        for file, state in zip(self.files, self.states, strict=True):
            if _state(file) != state:
                raise CheckpointError(
                    f"{file}: changed while it was in use; wait until the model is complete, and repeat the command"
                )


class HashedSource(ABC):
    """A source of tensors over files, which are hashed when their hash is first asked for."""

    @property
    @abstractmethod
    def weight_files(self) -> tuple[Path, ...]:
        """The files, in the order in which they are hashed."""

    def sha256(self) -> str:
        """Hash of the files."""
        return self._hashed.sha256

    def require_unchanged(self) -> None:
        """See that the files are those that were hashed.

        Raises:
            CheckpointError: One is not.
        """
        self._hashed.require_unchanged()

    @cached_property
    def _hashed(self) -> HashedFiles:
        return HashedFiles.of(self.weight_files)


def _state(file: Path) -> tuple[int, ...] | None:
    """Return what differs when a file is replaced, rewritten or removed."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


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
