"""Reading a corpus: a file, a folder of data files or of a saved dataset, or a dataset of the hub.

A source is read whole, whatever part of it the windows take, and its texts stay in memory; of columnar files only the
one column is read. Nothing is unpickled and no code of a dataset runs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.errors import CorpusError, one_line
from spike_export.artifacts.files.documents import require_files
from spike_export.artifacts.files.user_paths import user_path
from spike_export.calibration.corpus.chat import MESSAGE_KEYS, Chats, conversation
from spike_export.calibration.corpus.corpus import Corpus, default_corpus, python_source
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


HELP_TOPICS, OWN_TEXT, SOURCE_CODE = "builtin:help-topics", "builtin:own-text", "builtin:python-source"
"""Sources that need no file: help topics and source of Python's standard library, and text that the model writes."""

DEFAULT_SOURCES = (HELP_TOPICS, OWN_TEXT)
"""Two kinds of text: scales that are fitted to one kind saturate on others."""


@dataclass(frozen=True)
class CorpusOptions:
    """Where the text is, and what of it is text.

    Attributes:
        source: A file, a folder, `org/name` or `org/name:config` on the hub, or one of the built-in sources; several of
            them are kinds of text of their own. None for the default.
        text_field: Key of each record's text or, with `chat_template`, of its messages; None for the usual keys.
        split: Of a dataset; None for `train`.
        chat_template: Records are conversations, to be rendered with the tokenizer's chat template.
        weights: In which proportion calibration takes windows of the sources, one weight a source; all alike by
            default.
    """

    source: str | Path | Sequence[str | Path] | None = None
    text_field: str | None = None
    split: str | None = None
    chat_template: bool = False
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse weights that do not fit the sources."""
        if self.weights and len(self.weights) != len(self.sources):
            given = f"{len(self.chosen)} --corpus" if self.chosen else "the default corpus"
            raise CorpusError(f"{len(self.weights)} --corpus-weight for {given}; give one for each, in their order")
        for weight in self.weights:
            if not (math.isfinite(weight) and weight > 0):
                raise CorpusError(f"--corpus-weight is {weight}; expected a number above 0, such as 2")
        repeated = [str(each) for index, each in enumerate(self.sources) if each in self.sources[:index]]
        if repeated:
            raise CorpusError(f"--corpus {repeated[0]} is given twice; give it once, with a --corpus-weight")

    @property
    def chosen(self) -> tuple[str | Path, ...]:
        """The sources that were given; empty for the default."""
        if self.source is None:
            return ()
        return (self.source,) if isinstance(self.source, str | Path) else tuple(self.source)

    @property
    def sources(self) -> tuple[str | Path, ...]:
        """The sources, at least one."""
        return self.chosen or DEFAULT_SOURCES

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


@dataclass(frozen=True)
class OwnText:
    """Stands for text that the model has yet to write."""


_BUILT_IN: Mapping[object, Callable[[], Corpus | OwnText]] = {
    HELP_TOPICS: default_corpus,
    OWN_TEXT: OwnText,
    SOURCE_CODE: python_source,
}


def load_corpora(options: CorpusOptions) -> tuple[Corpus | Chats | OwnText, ...]:
    """Read every source of the options, in their order; conversations are not rendered yet.

    Raises:
        CorpusError: A source cannot be read or reached, has no such split or key, holds no text, needs a package that
            is not installed, or an option does not apply to it.
    """
    if all(source in _BUILT_IN for source in options.sources):
        _require_no_reading(options)
    return tuple(
        _BUILT_IN[source]() if source in _BUILT_IN else _read(str(source), options) for source in options.sources
    )


def require_judge(read: Sequence[Corpus | Chats | OwnText]) -> None:
    """Refuse corpora of which none can be evaluated on.

    Raises:
        CorpusError: All text would be the model's own.
    """
    if all(isinstance(each, OwnText) for each in read):
        raise CorpusError(f"{OWN_TEXT} alone leaves no text to evaluate on; give another --corpus beside it")


def _require_no_reading(options: CorpusOptions) -> None:
    for option, given in (("--corpus-split", options.split), ("--chat-template", options.chat_template)):
        if given:
            raise CorpusError(f"{option} says how to read a corpus, and none is given; add --corpus")


def _read(given: str, options: CorpusOptions) -> Corpus | Chats:
    """Read one source that is not built in."""
    source = _source(given, options)
    if options.chat_template:
        chats = tuple(conversation(_messages(each, options.wanted), each.place) for each in source.records)
        _require_content(given, bool(chats))
        return Chats(f"{source.name} (chat template)", chats)
    corpus = Corpus(source.name, tuple(_text(each, options.wanted) for each in source.records))
    _require_content(given, any(document.strip() for document in corpus.documents))
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
    require_files(folder.rglob("*"), CorpusError)
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
