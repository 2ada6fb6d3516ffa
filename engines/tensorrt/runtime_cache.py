"""Kernels that TensorRT-RTX compiled for this GPU, kept in a file beside the plan: the next start need not wait."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import atomic_path

_ENDING = ".runtime-cache"


def runtime_cache_path(plan: Path) -> Path:
    """Return the cache's place: `engine.plan` → `engine.runtime-cache`."""
    return plan.with_suffix(_ENDING)


@dataclass
class RuntimeCache:
    """A `trt.IRuntimeCache` and its file. Compiled code: to be trusted as much as the plan.

    Attributes:
        path: Of the file; None to keep nothing.
        handle: What a runtime configuration takes.
        loaded: Whether the file's kernels are of this version, GPU and driver; if not, they are compiled anew.
    """

    path: Path | None
    handle: Any
    loaded: bool = False
    _stored: str = field(default="", repr=False)

    @classmethod
    def open(cls, config: Any, path: Path | None) -> "RuntimeCache":
        """Make a cache of what the file holds.

        Args:
            config: The `trt.IRuntimeConfig` it is to be given to.
            path: Of the file, which need not exist.
        """
        cache = cls(path, config.create_runtime_cache())
        if path is not None:
            with suppress(OSError):  # one that cannot be read is made anew
                blob = path.read_bytes()
                cache.loaded = bool(cache.handle.deserialize(blob))
                cache._stored = hashlib.sha256(blob).hexdigest() if cache.loaded else ""
        return cache

    def save(self) -> bool:
        """Write the file where there is something new; return whether it was written.

        A folder that cannot be written to is no error: kernels are then compiled at the next start again.
        """
        if self.path is None:
            return False
        memory = self.handle.serialize()
        if memory is None:
            return False
        blob = bytes(memoryview(memory))
        digest = hashlib.sha256(blob).hexdigest()
        if not blob or digest == self._stored:
            return False
        try:
            with atomic_path(self.path) as partial:
                partial.write_bytes(blob)
        except ArtifactError:
            return False
        self._stored = digest
        return True
