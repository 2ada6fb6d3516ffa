"""Records of data files, one after another, of each only what is under the wanted key."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import CorpusError, one_line
from spike_export.artifacts.files.documents import require_file
from spike_export.artifacts.process.host_memory import require_available
from spike_export.calibration.corpus.chat import MESSAGE_KEYS

KINDS = (".txt", ".jsonl", ".parquet")

LARGEST_RECORD = 1 << 26
"""Bytes of the largest line of a `.jsonl` file, and characters of the largest text under a column: 64 MiB."""

_COPIES = 3
"""What is held of a file's bytes: they themselves, their text, and the text again where windows are cut."""

_ROWS = 1000
"""Rows of a columnar file that are decoded at once."""


@dataclass(frozen=True)
class DataFile:
    """A file to read; `label` is what errors call it, which for a downloaded one is not its place in the cache."""

    path: Path
    label: str


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        place: File and line or row, for messages of errors.
        key: The key that was looked for, or found.
        value: What is under it; None for nothing.
        keys: Which other keys there are.
    """

    place: str
    key: str
    value: object
    keys: Sequence[str] = ()


def file_records(file: DataFile, wanted: tuple[str, ...]) -> Iterator[Record]:
    """Read a file's records; a `.txt` file is one.

    Args:
        file: Its ending says how it is read.
        wanted: Keys; of each record the first one that is there counts. A column is chosen once for the whole file.

    Raises:
        CorpusError: The file cannot be read, has another ending, is damaged, or has none of the columns; or the package
            for `.parquet` files is not installed.
    """
    readers = {".txt": _text_file, ".jsonl": _json_lines, ".parquet": _parquet_rows}
    reader = readers.get(file.path.suffix)
    if reader is None:
        raise CorpusError(f"{file.label}: unknown kind of corpus; give a .txt, .jsonl or .parquet file")
    try:
        require_file(file.path)
        needed = _COPIES * file.path.stat().st_size
        require_available(needed, f"{file.label}: a corpus of this size", "give a part of it", CorpusError)
        yield from reader(file, wanted)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file.label}: not UTF-8 text (byte {error.start}); convert the file") from error
    except OSError as error:
        raise CorpusError(f"{file.label}: cannot read the corpus: {error.strerror or one_line(error)}") from error


def _text_file(file: DataFile, wanted: tuple[str, ...]) -> Iterator[Record]:
    if wanted == MESSAGE_KEYS:
        raise CorpusError(f"{file.label}: a text file holds no messages; leave --chat-template out")
    yield Record(file.label, wanted[0], file.path.read_text(encoding="utf-8"))


def _json_lines(file: DataFile, wanted: tuple[str, ...]) -> Iterator[Record]:
    read = 0
    with file.path.open("rb") as lines:
        # In binary, lines end at \n alone: U+2028 and the like may stand inside a JSON string.
        for number, line in enumerate(iter(partial(lines.readline, LARGEST_RECORD + 1), b""), start=1):
            if len(line) > LARGEST_RECORD:
                raise _too_large(f"{file.label}, line {number}")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                start, end = read + error.start, read + error.end
                raise UnicodeDecodeError(error.encoding, error.object, start, end, error.reason) from error
            read += len(line)
            if text.strip():
                yield _json_record(text, f"{file.label}, line {number}", wanted)


def _too_large(place: str) -> CorpusError:
    return CorpusError(f"{place}: a record of more than {LARGEST_RECORD >> 20} MiB; split it, or give a .txt file")


def _json_record(text: str, place: str, wanted: tuple[str, ...]) -> Record:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        return Record(place, wanted[0], None)
    key = next((key for key in wanted if key in fields), wanted[0])
    if "\\ud" in text.lower() and not _is_unicode(fields.get(key)):
        raise CorpusError(f"{place}: half of a surrogate pair, which is not text; correct or remove the record")
    return Record(place, key, fields.get(key), tuple(fields))


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_rows(file: DataFile, wanted: tuple[str, ...]) -> Iterator[Record]:
    parquet = optional_package("pyarrow.parquet", file.label)
    arrow = optional_package("pyarrow", file.label)
    with file.path.open("rb") as content:
        try:
            table = parquet.ParquetFile(content)
            column = wanted_column(table.schema_arrow.names, wanted, file.label)
            row = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(value, str) and len(value) > LARGEST_RECORD:
                        raise _too_large(f"{file.label}, row {row}")
                    yield Record(f"{file.label}, row {row}", column, value)
        except (arrow.ArrowException, OSError) as error:  # pyarrow takes some damage for an error of the disk
            raise CorpusError(f"{file.label}: damaged parquet file ({one_line(error)}); make it again") from error


def dataset_rows(dataset: Any, wanted: tuple[str, ...], label: str) -> Iterator[Record]:
    """Read the rows of a `datasets.Dataset`; they stay mapped from the disk, and only one column is decoded.

    Raises:
        CorpusError: It has none of the wanted columns.
    """
    column = wanted_column(dataset.column_names, wanted, label)
    row = 0
    for batch in dataset.with_format(None).select_columns([column]).iter(_ROWS):
        for value in batch[column]:
            row += 1
            yield Record(f"{label}, row {row}", column, value)


def wanted_column(columns: Sequence[str], wanted: tuple[str, ...], label: str) -> str:
    """Return the first wanted column that is there.

    Raises:
        CorpusError: None is; it says which columns there are.
    """
    found = next((key for key in wanted if key in columns), None)
    if found is None:
        there = ", ".join(map(repr, columns)) or "none"
        raise CorpusError(
            f"{label}: no column {' or '.join(map(repr, wanted))} (there: {there}); {remedy(wanted, columns)}"
        )
    return found


def remedy(wanted: tuple[str, ...], keys: Sequence[str]) -> str:
    """Say what to do about a record without the wanted keys, as the end of a message."""
    name = "name the right one with --text-field"
    if wanted == MESSAGE_KEYS:
        return f"{name}, or leave --chat-template out"
    return f"{name}, or render the messages with --chat-template" if set(MESSAGE_KEYS) & set(keys) else name


def optional_package(name: str, label: str) -> Any:
    """Import a package that only some corpora need.

    Raises:
        CorpusError: It is not installed; names the extra that brings it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise CorpusError(
            f"{label}: reading it needs the package {package}: pip install 'spike-export[corpora]'"
        ) from error
