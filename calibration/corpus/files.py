"""Reading a corpus: a file, a folder of data files or of a saved dataset, or a dataset of the hub.

A source is read whole, whatever part of it the windows take, and its texts stay in memory; of columnar files only the
one column is read. Nothing is unpickled and no code of a dataset runs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.errors import CorpusError, one_line
from spike_export.artifacts.user_paths import user_path
from spike_export.calibration.corpus.chat import MESSAGE_KEYS, Chats, conversation
from spike_export.calibration.corpus.corpus import Corpus, default_corpus
from spike_export.calibration.corpus.dataset_files import (
    datasets_package,
    folder_files,
    hub_files,
    looks_like_hub_dataset,
)
from spike_export.calibration.corpus.records import (
    KINDS,
    DataFile,
    Record,
    dataset_rows,
    file_records,
    remedy,
)

DEFAULT_SPLIT = "train"

# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave.
_SAVED_DATASET, _SAVED_SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class CorpusOptions:
    """Where a corpus is, and what of it is text.

    Attributes:
        source: A file, a folder, or `org/name` or `org/name:config` on the hub; None for the default corpus.
        text_field: Key of each record's text or, with `chat_template`, of its messages; None for the usual keys.
        split: Of a dataset; None for `train`.
        chat_template: Records are conversations, to be rendered with the tokenizer's chat template.
    """

    source: str | Path | None = None
    text_field: str | None = None
    split: str | None = None
    chat_template: bool = False

    @property
    def wanted(self) -> tuple[str, ...]:
        """Keys under which a record may hold its text or its messages, the preferred one first."""
        if self.text_field is not None:
            return (self.text_field,)
        return MESSAGE_KEYS if self.chat_template else ("text",)


@dataclass(frozen=True)
class _Source:
    name: str
    records: Iterable[Record]


def load_corpus(options: CorpusOptions) -> Corpus | Chats:
    """Read the user's corpus, or return the default one without a source; conversations are not rendered yet.

    Raises:
        CorpusError: The source cannot be read or reached, has no such split or key, holds no text, needs a package that
            is not installed, or an option does not apply to it.
    """
    if options.source is None:
        for option, given in (("--corpus-split", options.split), ("--chat-template", options.chat_template)):
            if given:
                raise CorpusError(f"{option} says how to read a corpus, and none is given; add --corpus")
        return default_corpus()
    named = str(options.source)
    source = _source(named, options)
    if options.chat_template:
        chats = tuple(conversation(_messages(each, options.wanted), each.place) for each in source.records)
        _require_content(named, bool(chats))
        return Chats(f"{source.name} (chat template)", chats)
    corpus = Corpus(source.name, tuple(_text(each, options.wanted) for each in source.records))
    _require_content(named, any(document.strip() for document in corpus.documents))
    return corpus


def _require_content(source: str, content: bool) -> None:
    if not content:
        raise CorpusError(f"{source}: the corpus is empty")


def _text(record: Record, wanted: tuple[str, ...]) -> str:
    if not isinstance(record.value, str):
        raise _lacks("text", record, wanted)
    return record.value


def _messages(record: Record, wanted: tuple[str, ...]) -> list[object]:
    if not isinstance(record.value, list):
        raise _lacks("messages", record, wanted)
    return record.value


def _lacks(what: str, record: Record, wanted: tuple[str, ...]) -> CorpusError:
    keys = " or ".join(map(repr, wanted))
    return CorpusError(f"{record.place}: no {what} under the key {keys}; {remedy(wanted, record.keys)}")


def _source(source: str, options: CorpusOptions) -> _Source:
    path = user_path(source, CorpusError)
    if path.suffix in KINDS or path.is_file():
        if options.split is not None:
            raise CorpusError(f"{source}: a file has no splits; leave --corpus-split out")
        return _Source(path.name, file_records(DataFile(path, source), options.wanted))
    folder, config = _folder_and_config(path)
    if folder is not None:
        return _folder(folder, config, source, options)
    if looks_like_hub_dataset(source):
        split = options.split or DEFAULT_SPLIT
        found = hub_files(source, split)
        # Said in every report: shards may be missing, of a download that was interrupted or was of other files.
        known = split if found.complete else f"{split}, what was downloaded before"
        return _Source(f"{source} ({known})", _all_records(found.files, options))
    raise CorpusError(
        f"{source}: no such file or folder; give a {', '.join(KINDS)} file, a dataset's folder, or org/name on the hub"
    )


def _folder_and_config(path: Path) -> tuple[Path | None, str | None]:
    if path.is_dir():
        return path, None
    name, colon, config = path.name.rpartition(":")
    folder = path.with_name(name) if name else path
    return (folder, config) if colon and folder.is_dir() else (None, None)


def _folder(folder: Path, config: str | None, source: str, options: CorpusOptions) -> _Source:
    if (folder / _SAVED_DATASET).exists() or (folder / _SAVED_SPLITS).exists():
        return _saved(folder, source, options)
    split = options.split or DEFAULT_SPLIT
    name = folder.resolve().name + (f":{config}" if config else "")
    return _Source(f"{name} ({split})", _all_records(folder_files(folder, config, split, source), options))


def _saved(folder: Path, source: str, options: CorpusOptions) -> _Source:
    """Open what `save_to_disk` left: one dataset without splits, or one per split."""
    datasets = datasets_package(source)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a missing or damaged file makes pyarrow, json or datasets itself raise
        raise CorpusError(f"{source}: cannot read the saved dataset ({one_line(error)}); save it again") from error
    if not isinstance(found, dict):
        if options.split is not None:
            raise CorpusError(f"{source}: was saved without splits; leave --corpus-split out")
        return _Source(folder.resolve().name, dataset_rows(found, options.wanted, source))
    split = options.split or DEFAULT_SPLIT
    if split not in found:
        raise CorpusError(f"{source}: no split {split!r}; choose one with --corpus-split: {', '.join(found)}")
    return _Source(f"{folder.resolve().name} ({split})", dataset_rows(found[split], options.wanted, source))


def _all_records(files: Iterable[DataFile], options: CorpusOptions) -> Iterator[Record]:
    for file in files:
        yield from file_records(file, options.wanted)
