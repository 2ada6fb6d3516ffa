"""Predictions of reference models that outlive a check: the next check of the same model and text reads them."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spike_export.engines.accuracy.predictions import KEPT, SAMPLES, Predictions

_FORMAT = 1

_ENDING = ".npy"

_SEAL = hashlib.sha256().digest_size


@dataclass(frozen=True)
class ReferenceCache:
    """Files of predictions in a folder; the least recently used ones make room for new ones.

    Attributes:
        folder: Holds one file for each model, prefix and set of windows.
        model: Stands for all that the predictions take from the model and from this program.
        limit: Bytes that all files together may take.
        fresh: Read nothing that an earlier check left; what is computed replaces it.
    """

    folder: Path
    model: str
    limit: int
    fresh: bool = False

    def file(self, content: NDArray[np.int64], prefix: Sequence[int], bos: int | None) -> Path:
        """Return where the predictions on windows [windows, tokens] behind a prefix lie."""
        windows = hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest()
        parts = [_FORMAT, KEPT, SAMPLES, self.model, windows, list(content.shape), list(map(int, prefix)), bos]
        return self.folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}{_ENDING}"

    def read(self, file: Path, record: np.dtype[np.void], shape: tuple[int, int]) -> Predictions | None:
        """Return predictions, mapped from the disk; None where no sound file is there."""
        if self.fresh:
            return None
        try:
            if not _sealed(file):
                return None
            rows = np.load(file, mmap_mode="r", allow_pickle=False)
            os.utime(file)  # used now
        except (OSError, ValueError):
            return None
        return rows if (rows.dtype, rows.shape) == (record, shape) else None

    def place(self, needed: int) -> bool:
        """Make room for a file of so many bytes; return whether the folder can take it at all."""
        if needed > self.limit:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            files = sorted((each.stat().st_mtime, each.stat().st_size, each) for each in self.folder.iterdir())
        except OSError:
            return False
        excess = sum(size for _, size, _ in files) + needed - self.limit
        for _, size, each in files:
            if excess <= 0:
                break
            with suppress(OSError):  # another check may have removed the file
                each.unlink()
            excess -= size
        return os.access(self.folder, os.W_OK) and shutil.disk_usage(self.folder).free >= needed


def _sealed(file: Path) -> bool:
    """Return whether a file ends with the hash of all that stands before: numbers that a disk damaged look sound."""
    content = np.memmap(file, np.uint8, "r")
    return hashlib.sha256(content[:-_SEAL].data).digest() == content[-_SEAL:].tobytes()
