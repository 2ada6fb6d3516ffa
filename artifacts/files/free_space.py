"""Room on the disk, asked for before a large artifact is written."""

import shutil
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError


def require_free_space(destination: Path, needed: int, what: str) -> None:
    """Refuse to write an artifact where too little room is left.

    Args:
        destination: Where the artifact goes; it and its folder need not be there yet.
        needed: Its size in bytes.
        what: What it is, with its article.

    Raises:
        ArtifactError: Names both sizes.
    """
    existing = destination.absolute().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ArtifactError(
            f"{destination}: {what} needs {needed:,} bytes and {free:,} are free; free space there or choose another "
            "place"
        )
