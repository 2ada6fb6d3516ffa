"""Documents in a file that `--corpus` reads too: a line of JSON with the key `text` for each."""

import json
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.atomic_write import write_text
from spike_export.artifacts.files.documents import read_document


def save_documents(documents: tuple[str, ...], path: Path) -> None:
    """Write documents, whole or not at all."""
    write_text(path, "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents))


def load_documents(path: Path) -> tuple[str, ...]:
    """Read what `save_documents` wrote.

    Raises:
        ArtifactError: The file cannot be read.
    """
    try:
        lines = read_document(path).split("\n")
        return tuple(str(json.loads(line)["text"]) for line in lines if line)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot read the text ({error}); run again with --force") from error
