"""JSON documents read as values: one message for a file that is missing, damaged or of another kind."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files.documents import read_document

Document = TypeVar("Document")


def load_document(path: Path, kind: type[Document], remedy: str) -> Document:
    """Read a JSON document.

    Args:
        path: Its file.
        kind: What the document is read as: a pydantic model, or a type of such models.
        remedy: What to do about a file that is none, for the message.

    Raises:
        ArtifactError: The file is missing, not JSON, or of another kind; the first fault is named.
    """
    try:
        return TypeAdapter(kind).validate_json(read_document(path))
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_fault(error)}; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); {remedy}") from error


def first_fault(error: ValidationError) -> str:
    """Return the place of the first fault in a document, and what is wrong there."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"]) or "the document"
    return f"{where}: {fault['msg']}"
