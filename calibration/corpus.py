"""Text to calibrate and to evaluate on, cut into token windows that do not overlap between the two uses."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spike_export.calibration.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_SEPARATOR = "\n\n"
DEFAULT_CORPUS = "pydoc topics"

EVALUATION_WINDOWS = 8
EVALUATION_SHARE = 0.25
"""Part of a corpus, at its end, that is kept for evaluation."""

# Where the default corpus is evaluated. Fixed, so that figures of different runs and tools can be compared.
_PYDOC_EVALUATION_START = 60_000
_PYDOC_EVALUATION_STEP = 3_000


@dataclass(frozen=True)
class Corpus:
    """A text.

    Attributes:
        name: What to call it in a report.
        text: All documents, separated by blank lines.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class TokenWindows:
    """Content windows without BOS, [windows, tokens] int64 each; calibration and evaluation share no token."""

    calibration: NDArray[np.int64]
    evaluation: NDArray[np.int64]


def default_corpus() -> Corpus:
    """Return the help topics of Python's standard library: English prose and code, on every machine, offline."""
    from pydoc_data.topics import topics

    return Corpus(DEFAULT_CORPUS, DOCUMENT_SEPARATOR.join(topics.values()))


def load_corpus(path: Path | None, text_field: str = "text") -> Corpus:
    """Return the user's text, or the default corpus without one.

    Raises:
        CorpusError: As `read_corpus`.
    """
    return default_corpus() if path is None else read_corpus(path, text_field)


def read_corpus(path: Path, text_field: str = "text") -> Corpus:
    """Read a `.txt` file, or a `.jsonl` file with one document per line under `text_field`.

    Raises:
        CorpusError: The file cannot be read, has another ending, or holds no text.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise CorpusError(f"{path}: unknown kind of corpus; give a .txt or a .jsonl file")
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CorpusError(f"{path}: cannot read the corpus: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text (byte {error.start}); convert the file") from error
    if path.suffix == ".jsonl":
        content = DOCUMENT_SEPARATOR.join(_documents(path, content, text_field))
    if not content.strip():
        raise CorpusError(f"{path}: the corpus is empty")
    return Corpus(path.name, content)


def _documents(path: Path, content: str, text_field: str) -> list[str]:
    documents = []
    # Not splitlines(), which also breaks at U+2028 and the like, and those may stand inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CorpusError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            raise CorpusError(f"{path}, line {number}: no text under the key {text_field!r}; name it with --text-field")
        documents.append(record[text_field])
    return documents


def token_windows(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase | None", samples: int, length: int, seed: int
) -> TokenWindows:
    """Tokenize a corpus and cut windows of `length` tokens.

    Calibration takes `samples` windows, one at a random place of each of as many equal parts of the corpus's first
    region; evaluation takes `EVALUATION_WINDOWS` evenly spaced windows of the rest (fewer where they would overlap).

    Raises:
        CorpusError: There is no tokenizer, or too few tokens for a window of each kind.
    """
    if tokenizer is None:
        raise CorpusError("the checkpoint has no tokenizer, so that no text can be calibrated on; add tokenizer.json")
    encoded = tokenizer.backend_tokenizer.encode(corpus.text, add_special_tokens=False).ids
    tokens = np.asarray(encoded, dtype=np.int64)
    if len(tokens) < 2 * length:
        raise CorpusError(
            f"{corpus.name}: {len(tokens)} tokens; calibration and evaluation need at least {2 * length} "
            f"(two windows of {length}): give a longer corpus or a smaller --length"
        )
    starts = _evaluation_starts(corpus.name, len(tokens), length)
    region = int(starts[0])
    stride = region / samples
    jitter = np.random.default_rng(seed).random(samples) * max(stride - length, 0.0)
    first = np.minimum((np.arange(samples) * stride + jitter).astype(np.int64), region - length)
    return TokenWindows(windows_at(tokens, first, length), windows_at(tokens, starts, length))


def _evaluation_starts(name: str, tokens: int, length: int) -> NDArray[np.int64]:
    pydoc = _PYDOC_EVALUATION_START + _PYDOC_EVALUATION_STEP * np.arange(EVALUATION_WINDOWS, dtype=np.int64)
    if name == DEFAULT_CORPUS and length <= _PYDOC_EVALUATION_STEP and pydoc[-1] + length <= tokens:
        return pydoc
    region = min(max(length, int(tokens * EVALUATION_SHARE)), tokens - length)
    count = min(EVALUATION_WINDOWS, region // length)
    return tokens - region + (np.arange(count, dtype=np.int64) * (region - length)) // max(1, count - 1)


def windows_at(tokens: NDArray[np.int64], starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Return the windows [len(starts), length] of `tokens` that begin at `starts`."""
    return np.stack([tokens[start : start + length] for start in starts])
