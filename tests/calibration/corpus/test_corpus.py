"""Corpora: what is read, from files, folders and saved datasets, and what is refused and how."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.process import host_memory
from spike_export.calibration.corpus import records as corpus_records
from spike_export.calibration.corpus.chat import Chats
from spike_export.calibration.corpus.corpus import DEFAULT_CORPUS, Corpus, default_corpus
from spike_export.calibration.corpus.files import HELP_TOPICS, CorpusOptions, load_corpora


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may leave anything in, or read anything from, the caches of whoever runs it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def read(source: Path | str, text_field: str | None = None, split: str | None = None) -> Corpus:
    (corpus,) = load_corpora(CorpusOptions(str(source), text_field, split))
    assert isinstance(corpus, Corpus)
    return corpus


def refusal(source: Path | str, text_field: str | None = None, split: str | None = None, chat: bool = False) -> str:
    with pytest.raises(CorpusError) as caught:
        load_corpora(CorpusOptions(str(source), text_field, split, chat))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


DOCUMENTS = ("ein\n\nText", "zwei ü", "drei")
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("ein\n\nzwei ü\n", encoding="utf-8")
    corpus = read(tmp_path / "mine.txt")
    assert corpus == Corpus("mine.txt", ("ein\n\nzwei ü\n",))
    assert corpus.text == "ein\n\nzwei ü\n"
    assert corpus.sha256 == hashlib.sha256("ein\n\nzwei ü\n".encode()).hexdigest()


def test_the_default_corpus_is_the_help_topics_separated_by_blank_lines() -> None:
    from pydoc_data.topics import topics

    (corpus,) = load_corpora(CorpusOptions(HELP_TOPICS))
    assert corpus == default_corpus()
    assert isinstance(corpus, Corpus)
    assert (corpus.name, len(corpus.documents)) == (DEFAULT_CORPUS, len(topics))
    assert corpus.sha256 == hashlib.sha256("\n\n".join(topics.values()).encode()).hexdigest()


def test_where_documents_end_is_part_of_what_identifies_them() -> None:
    one, two = Corpus("a", ("x\n\ny",)), Corpus("a", ("x", "y"))
    assert one.sha256 == two.sha256
    assert one.boundaries_sha256 != two.boundaries_sha256


def test_documents_of_jsonl_are_separated_by_blank_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a\nb", "other": 1}), "", json.dumps({"text": "ü"})]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read(tmp_path / "mine.jsonl").documents == ("a\nb", "ü")
    assert read(tmp_path / "mine.jsonl").text == "a\nb\n\nü"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_separator_inside_a_document_does_not_end_the_line(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
    assert read(tmp_path / "mine.jsonl").text == text


def test_jsonl_with_windows_line_ends_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert read(tmp_path / "mine.jsonl").text == "a\n\nb"


def test_a_whole_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(r'{"text": "\uD83D\uDE00", "other": "\uD83D"}')
    assert read(tmp_path / "mine.jsonl").text == "\U0001f600"


def test_another_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "no", "content": "yes"}')
    assert read(tmp_path / "mine.jsonl", "content").text == "yes"


def test_a_column_of_parquet_is_read(tmp_path: Path) -> None:
    columns = {"text": list(DOCUMENTS), "body": ["x", "y", "z"], "number": [1, 2, 3]}
    path = write_parquet(tmp_path / "mine.parquet", columns, row_group_size=2)
    assert read(path) == Corpus("mine.parquet", DOCUMENTS)
    assert read(path, "body").documents == ("x", "y", "z")


def test_no_other_column_of_parquet_is_decoded(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "mine.parquet", {"text": list(DOCUMENTS), "large": ["y" * 4000, "z", "w"]})
    size = parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    # Damage the other column's pages: a reader that decodes them fails.
    start = size.dictionary_page_offset or size.data_page_offset
    content[start : start + size.total_compressed_size] = b"\xff" * size.total_compressed_size
    path.write_bytes(content)
    assert read(path).documents == DOCUMENTS
    assert "damaged parquet file" in refusal(path, "large")


def test_more_rows_of_parquet_than_are_decoded_at_once(tmp_path: Path) -> None:
    documents = [f"document {n}" for n in range(2 * corpus_records._ROWS + 3)]
    path = write_parquet(tmp_path / "mine.parquet", {"text": documents})
    assert read(path).documents == tuple(documents)
    documents[-1] = None
    write_parquet(path, {"text": documents})
    assert refusal(path).startswith(f"{path}, row {len(documents)}: no text under the key 'text'")


def test_a_saved_dataset_without_splits_is_read(tmp_path: Path) -> None:
    columns = {"text": list(DOCUMENTS), "number": [1, 2, 3]}
    datasets.Dataset.from_dict(columns).select([2, 0]).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == Corpus("saved", (DOCUMENTS[2], DOCUMENTS[0]))
    assert "was saved without splits; leave --corpus-split out" in refusal(tmp_path / "saved", split="test")
    assert "no column 'body' (there: 'text', 'number')" in refusal(tmp_path / "saved", "body")


def test_a_saved_dataset_with_splits_is_read(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"body": [name, "x"]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", "body") == Corpus("saved (train)", ("train", "x"))
    assert read(tmp_path / "saved", "body", "test") == Corpus("saved (test)", ("test", "x"))
    message = refusal(tmp_path / "saved", "body", "dev")
    assert message == f"{tmp_path / 'saved'}: no split 'dev'; choose one with --corpus-split: train, test"


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert "cannot read the saved dataset (" in refusal(tmp_path / "saved")


def test_a_folder_of_parquet_files_is_read_like_a_hub_repository(tmp_path: Path) -> None:
    data = tmp_path / "prose" / "data"
    data.mkdir(parents=True)
    for shard in (0, 1):
        columns = {"text": [f"train {shard}"], "id": [shard]}
        write_parquet(data / f"train-0000{shard}-of-00002.parquet", columns)
    write_parquet(data / "test-00000-of-00001.parquet", {"text": ["test"], "id": [2]})
    (tmp_path / "prose" / "README.md").write_text("# No front matter\n")
    assert read(tmp_path / "prose") == Corpus("prose (train)", ("train 0", "train 1"))
    assert read(tmp_path / "prose", split="test").documents == ("test",)
    assert "no split 'dev'; choose one with --corpus-split: train, test" in refusal(tmp_path / "prose", split="dev")


def test_configurations_of_a_folder_are_those_of_its_readme(tmp_path: Path) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    write_jsonl(folder / "en.jsonl", [{"text": "english"}])
    write_jsonl(folder / "de.jsonl", [{"text": "deutsch"}])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert read(f"{folder}:de") == Corpus("prose:de (train)", ("deutsch",))
    assert read(f"{folder}:en").documents == ("english",)
    message = refusal(folder)
    assert "cannot be read as a data set" in message
    assert "['en', 'de']" in message  # the library asks for one of them
    assert "cannot be read as a data set" in refusal(f"{folder}:fr")


def test_a_folder_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"text": "a"}])
    read(folder)
    assert list(Path(datasets.config.HF_DATASETS_CACHE).iterdir()) == []


def test_a_bad_line_in_a_folder_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    path = write_jsonl(tmp_path / "prose" / "train.jsonl", [{"text": "a"}, {"body": "b"}])
    assert refusal(tmp_path / "prose").startswith(f"{path}, line 2: no text under the key 'text'")


@pytest.mark.parametrize("name", ["data.csv", "train.json", "model.pkl", None])
def test_a_folder_of_other_files_is_refused(tmp_path: Path, name: str | None) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    if name:
        (folder / name).write_text("[1]")
    assert refusal(folder).startswith(f"{folder}")


def test_a_script_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    (folder / "prose.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    write_jsonl(folder / "train.jsonl", [{"text": "a"}])
    assert "scripts are no longer supported" in refusal(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "package"),
    [("mine.parquet", "pyarrow"), ("saved", "datasets"), ("folder", "datasets"), ("org/name", "datasets")],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    write_parquet(tmp_path / "mine.parquet", {"text": ["a"]})
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl", [{"text": "a"}])
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert refusal(name) == f"{name}: reading it needs the package {package}: pip install 'spike-export[corpora]'"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("mine.csv", b"text", "unknown kind of corpus; give a .txt, .jsonl or .parquet file"),
        ("mine", b"text", "unknown kind of corpus; give a .txt, .jsonl or .parquet file"),
        ("mine.txt", b"", "the corpus is empty"),
        ("mine.txt", b" \n\n ", "the corpus is empty"),
        ("mine.jsonl", b"\n\n", "the corpus is empty"),
        ("mine.jsonl", b'{"text": ""}', "the corpus is empty"),
        ("mine.txt", b"abc\xff", "not UTF-8 text (byte 3); convert the file"),
        ("mine.jsonl", b'{"text": "\xff"}', "not UTF-8 text (byte 10); convert the file"),
        ("mine.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "not UTF-8 text (byte 24); convert the file"),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    assert refusal(tmp_path / file) == f"{tmp_path / file}: {message}"


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, but long enough to look for a footer"])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.parquet").write_bytes(content)
    assert refusal(tmp_path / "mine.parquet").startswith(f"{tmp_path / 'mine.parquet'}: damaged parquet file (")


def test_a_parquet_file_without_the_column_says_which_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "mine.parquet", {"body": ["a"], "id": [1]})
    assert refusal(path) == (f"{path}: no column 'text' (there: 'body', 'id'); name the right one with --text-field")
    assert "row 1: no text under the key 'id'" in refusal(path, "id")
    empty = write_parquet(tmp_path / "empty.parquet", {"text": pyarrow.array([], pyarrow.string())})
    assert refusal(empty) == f"{empty}: the corpus is empty"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: not JSON ("),
        ("[" * 100_000, "line 3: not JSON ("),
        ('{"body": "x"}', "line 3: no text under the key 'text'; name the right one with --text-field"),
        ('{"text": 5}', "line 3: no text under the key 'text'"),
        ('["text"]', "line 3: no text under the key 'text'"),
        (r'{"text": "a \uD83D b"}', "line 3: half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    # The blank line counts, so that an editor finds the place.
    (tmp_path / "mine.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    assert refusal(tmp_path / "mine.jsonl").startswith(f"{tmp_path / 'mine.jsonl'}, {message}")


def test_a_missing_file_and_a_folder_named_like_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    assert "cannot read the corpus: No such file" in refusal(tmp_path / "none.txt")
    assert "cannot read the corpus: No such file" in refusal(tmp_path / "none.parquet")
    assert "cannot read the corpus: Is a directory" in refusal(tmp_path / "folder.txt")
    nowhere = refusal(tmp_path / "none")
    assert "no such file or folder; give a .txt, .jsonl, .parquet file, a dataset's folder, or org/name" in nowhere


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "mine.jsonl", [{"text": "a"}])
    assert refusal(path, split="train") == f"{path}: a file has no splits; leave --corpus-split out"


@pytest.mark.parametrize(
    ("options", "option"),
    [(CorpusOptions(split="test"), "--corpus-split"), (CorpusOptions(chat_template=True), "--chat-template")],
)
def test_an_option_of_reading_without_a_corpus_is_refused(options: CorpusOptions, option: str) -> None:
    with pytest.raises(CorpusError, match=f"^{option} .* add --corpus$"):
        load_corpora(options)


def test_conversations_are_read_from_every_kind_of_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT, "text": "x"}])
    write_parquet(tmp_path / "chats.parquet", {"messages": [CHAT], "text": ["x"]})
    datasets.Dataset.from_dict({"messages": [CHAT], "text": ["x"]}).save_to_disk(tmp_path / "chats")
    for source in (path, tmp_path / "chats.parquet", tmp_path / "chats"):
        (chats,) = load_corpora(CorpusOptions(str(source), chat_template=True))
        assert isinstance(chats, Chats)
        assert chats.name == f"{source.name} (chat template)"
        (conversation,) = chats.conversations
        assert [(message.role, message.content) for message in conversation.messages] == [
            ("user", "Hi"),
            ("assistant", "Ho"),
        ]


def test_sharegpt_conversations_are_read(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"id": 1, "conversations": turns}])
    (chats,) = load_corpora(CorpusOptions(str(path), chat_template=True))
    assert isinstance(chats, Chats)
    messages = chats.conversations[0].messages
    assert [(message.role, message.content) for message in messages] == [
        ("system", "s"),
        ("user", "h"),
        ("assistant", "g"),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "line 1: no messages under the key 'messages' or 'conversations'; name the right one"),
        ({"messages": "x"}, "line 1: no messages under the key"),
        ({"messages": []}, "line 1: a conversation without messages; remove it"),
        ({"messages": ["x"]}, "line 1, message 1: expected text under role and content"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "line 1, message 2: expected text"),
    ],
)
def test_records_without_messages_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [record])
    assert refusal(path, chat=True).startswith(f"{path}, {message}")


def test_messages_without_the_option_hint_at_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    assert refusal(path).endswith("with --text-field, or render the messages with --chat-template")
    (tmp_path / "mine.txt").write_text("x")
    assert refusal(tmp_path / "mine.txt", chat=True).endswith("holds no messages; leave --chat-template out")
    table = write_parquet(tmp_path / "mine.parquet", {"text": ["a"]})
    assert refusal(table, chat=True) == (
        f"{table}: no column 'messages' or 'conversations' (there: 'text'); name the right one with --text-field, "
        "or leave --chat-template out"
    )


def test_a_readme_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "prose"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    write_jsonl(folder / "en.jsonl", [{"text": "english"}])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: ../secret.txt\n---\n")
    assert "secret.txt, outside of the folder; correct data_files there" in refusal(folder)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "prose").mkdir()
    for name in ("mine.jsonl", "prose/train.jsonl"):
        os.mkfifo(tmp_path / name)
    assert refusal(tmp_path / "mine.jsonl").endswith("cannot read the corpus: a pipe, socket or device, not a file")
    assert "train.jsonl: a pipe, socket or device, not a file; remove it" in refusal(tmp_path / "prose")


def test_a_record_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_records, "LARGEST_RECORD", 1 << 20)
    long = "a" * ((1 << 20) + 1)
    lines = write_jsonl(tmp_path / "mine.jsonl", [{"text": "a"}, {"text": long}])
    assert f"{lines}, line 2: a record of more than 1 MiB; split it" in refusal(lines)
    table = write_parquet(tmp_path / "mine.parquet", {"text": ["a", "b", long]})
    assert f"{table}, row 3: a record of more than 1 MiB; split it" in refusal(table)


def test_a_corpus_that_exceeds_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("words " * 1000)
    monkeypatch.setattr(host_memory, "available_memory", lambda: 17_000)
    assert "a corpus of this size needs about 0.0 GiB of memory, 0.0 GiB are available" in refusal(
        tmp_path / "mine.txt"
    )
    monkeypatch.setattr(host_memory, "available_memory", lambda: 19_000)
    assert read(tmp_path / "mine.txt").characters == 6000
