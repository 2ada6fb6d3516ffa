"""What may be replaced: only what carries the mark of a file that spike-export wrote.

A mark is the format and the kind that the document itself states. Everything else at a place stays, unless the user
asks for the contrary with `--overwrite`.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.documents import read_document
from spike_export.artifacts.manifest import MANIFEST_FILE

_MANIFEST_KEYS = ("format", "model", "kv_cache", "linears")

CHECKPOINT_MARK = "spike_export.json"
"""What an exported checkpoint has in place of a bundle's manifest."""

_MARK_KEYS = ("format", "kind", "model", "recipe_sha256")


def require_replaceable(path: Path, kind: str, is_ours: Callable[[Path], bool], *, overwrite: bool = False) -> None:
    """Refuse to replace a file or a folder that was not written here.

    Args:
        path: Where an artifact is to be written.
        kind: What the artifact is, with its article, for the message.
        is_ours: Whether what is there carries the artifact's mark.
        overwrite: Whether the user allows to replace anything.

    Raises:
        ArtifactError: Something else is there.
    """
    there = path.is_symlink() or path.exists()
    if there and not overwrite and not is_ours(path):
        raise ArtifactError(
            f"{path}: exists and is not {kind} that spike-export wrote; give another place, or --overwrite"
        )


def is_document(path: Path, *keys: str) -> bool:
    """Return whether a file is a JSON object with these keys at its top."""
    return _has(_document(path), keys)


def is_bundle(folder: Path) -> bool:
    """Return whether a folder is empty, or a bundle that holds nothing but what export wrote."""
    return _is_written(folder, MANIFEST_FILE, _MANIFEST_KEYS)


def is_written_checkpoint(folder: Path) -> bool:
    """Return whether a folder is empty, or a checkpoint that holds nothing but what export wrote."""
    return _is_written(folder, CHECKPOINT_MARK, _MARK_KEYS)


def _is_written(folder: Path, mark: str, keys: Iterable[str]) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if not found:
        return True
    document = _document(folder / mark)
    return _has(document, keys) and not _foreign(document.get("files"), found - {mark})


def _document(path: Path) -> Any:
    """Return what a JSON file holds, or None where it is no JSON file."""
    try:
        return json.loads(read_document(path))
    except (OSError, ValueError, RecursionError):
        return None


def _has(document: Any, keys: Iterable[str]) -> bool:
    return isinstance(document, dict) and all(key in document for key in keys)


def _foreign(listed: Any, found: set[str]) -> set[str]:
    """Return the files of a folder that its mark does not list; none where an older mark lists nothing."""
    if not isinstance(listed, list) or not listed:
        return set()
    return found - {name for name in listed if isinstance(name, str)}
