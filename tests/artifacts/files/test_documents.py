import os
from pathlib import Path

import pytest

from spike_export.artifacts.errors import CheckpointError, CorpusError
from spike_export.artifacts.files import documents
from spike_export.artifacts.files.documents import read_document, require_files
from spike_export.artifacts.files.user_paths import user_path


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="a pipe, socket or device"):
        read_document(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: a pipe, socket or device, not a file; remove it"):
        require_files(tmp_path.iterdir(), CheckpointError)


def test_a_device_a_folder_and_a_name_with_nul_are_refused(tmp_path: Path) -> None:
    for path, reason in ((Path("/dev/zero"), "device"), (tmp_path, "Is a directory"), (Path("a\0b"), "NUL")):
        with pytest.raises(OSError, match=reason):
            read_document(path)


def test_a_document_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LARGEST_DOCUMENT", 1 << 20)
    (tmp_path / "a.json").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(OSError, match="larger than 1 MiB"):
        read_document(tmp_path / "a.json")


@pytest.mark.parametrize(("text", "reason"), [("~nosuchuser/x", "no such home folder"), ("a\0b", "NUL character")])
def test_a_path_that_means_nothing_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CorpusError, match=reason):
        user_path(text, CorpusError)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a.txt", CorpusError) == tmp_path / "a.txt"
