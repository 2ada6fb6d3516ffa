"""The text to calibrate and to evaluate on, and the one that is there without any file."""

import hashlib
import json
import sysconfig
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

DOCUMENT_SEPARATOR = "\n\n"
DEFAULT_CORPUS = "pydoc topics"
PYTHON_SOURCE = "Python source"

_SOURCE_MODULES = ("csv", "heapq", "json/decoder", "textwrap")
"""About 70,000 characters."""


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

    @property
    def text(self) -> str:
        """All documents, joined: as large again as the documents."""
        return self.separator.join(self.documents)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Per document, the place in the joined text behind it and the separator that follows it."""
        return tuple(accumulate(len(document) + len(self.separator) for document in self.documents))

    @property
    def characters(self) -> int:
        """Characters of the joined text."""
        return self._ends[-1] - len(self.separator) if self.documents else 0

    def excerpt(self, start: int, stop: int) -> str:
        """Return characters `start` to `stop` of the joined text, without joining it."""
        parts, place = [], bisect_right(self._ends, start)
        while place < len(self.documents) and (begin := self._ends[place - 1] if place else 0) < stop:
            part = self.documents[place] if place == len(self.documents) - 1 else self.documents[place] + self.separator
            parts.append(part[max(0, start - begin) : stop - begin])
            place += 1
        return "".join(parts)

    @cached_property
    def sha256(self) -> str:
        """Hash of the text in UTF-8, in hexadecimal; records that are turned into other text have another one."""
        digest = hashlib.sha256()
        for index, document in enumerate(self.documents):
            digest.update((document if index == 0 else self.separator + document).encode())
        return digest.hexdigest()

    @cached_property
    def boundaries_sha256(self) -> str:
        """Hash of where the documents end, in hexadecimal: the text alone does not tell."""
        lengths = [len(self.separator), *(len(document) for document in self.documents)]
        return hashlib.sha256(json.dumps(lengths).encode()).hexdigest()


def python_source() -> Corpus:
    """Return the source of some modules of Python's standard library: a kind of text that no default calibrates on.

    A module that an installation lacks is left out.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = (folder / f"{name}.py" for name in _SOURCE_MODULES)
    return Corpus(PYTHON_SOURCE, tuple(path.read_text(encoding="utf-8") for path in files if path.is_file()))


def default_corpus() -> Corpus:
    """Return the help topics of Python's standard library: English prose and code, on every machine, offline."""
    from pydoc_data.topics import topics

    return Corpus(DEFAULT_CORPUS, tuple(topics.values()))
