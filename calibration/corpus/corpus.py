"""The text to calibrate and to evaluate on, and the one that is there without any file."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

DOCUMENT_SEPARATOR = "\n\n"
DEFAULT_CORPUS = "pydoc topics"


@dataclass(frozen=True)
class Corpus:
    """Documents, all in memory.

    Attributes:
        name: What to call it in a report.
        documents: The texts, in the source's order.
        separator: What stands between two documents where they are joined.
    """

    name: str
    documents: tuple[str, ...]
    separator: str = DOCUMENT_SEPARATOR

    @cached_property
    def text(self) -> str:
        """All documents, joined."""
        return self.separator.join(self.documents)

    @cached_property
    def sha256(self) -> str:
        """Hash of the text in UTF-8, in hexadecimal; records that are turned into other text have another one."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def boundaries_sha256(self) -> str:
        """Hash of where the documents end, in hexadecimal: the text alone does not tell."""
        lengths = [len(self.separator), *(len(document) for document in self.documents)]
        return hashlib.sha256(json.dumps(lengths).encode()).hexdigest()


def default_corpus() -> Corpus:
    """Return the help topics of Python's standard library: English prose and code, on every machine, offline."""
    from pydoc_data.topics import topics

    return Corpus(DEFAULT_CORPUS, tuple(topics.values()))
