"""A JSON file that a function writes its result to, where the caller names one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spike_export.artifacts.files.atomic_write import require_file_name, write_text
from spike_export.artifacts.ownership import is_document, require_replaceable


@dataclass(frozen=True)
class ResultFile:
    """Where a result goes.

    Attributes:
        path: The file; None for no file.
        what: What such a file holds, for messages.
        keys: Which a document of this kind has.
    """

    path: Path | None
    what: str
    keys: tuple[str, ...]

    @classmethod
    def at(cls, place: Path | str | None, what: str, *keys: str, overwrite: bool) -> "ResultFile":
        """Return the file at a place, after a look that the place can be written to.

        Args:
            place: The path; None for no file.
            what: What such a file holds.
            keys: Which a document of this kind has.
            overwrite: Replace also a file that is none of this kind.

        Raises:
            ArtifactError: The path names no file, or another file is there.
        """
        found = cls(None if place is None else Path(place), what, keys)
        if found.path is not None:
            require_file_name(found.path)
            require_replaceable(found.path, what, found._is_ours, overwrite=overwrite)
        return found

    def write(self, document: dict[str, Any]) -> None:
        """Write the result, if there is a file to write it to.

        Raises:
            ArtifactError: The file cannot be written.
        """
        if self.path is not None:
            write_text(self.path, json.dumps(document, indent=2) + "\n")

    def _is_ours(self, path: Path) -> bool:
        return is_document(path, *self.keys)
