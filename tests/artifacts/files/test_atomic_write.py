"""Artifacts appear whole or not at all, whatever interrupts the writing."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files import atomic_write
from spike_export.artifacts.files.atomic_write import atomic_path, finish_replacement, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, content: str) -> None:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text(content)


def write_and_fail(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error


def fill_and_fail(target: Path, error: BaseException) -> None:
    with atomic_path(target) as temporary:
        fill(temporary, "half")
        raise error


def test_a_file_appears_with_its_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "recipe.json", "ä")
    assert (tmp_path / "a" / "b" / "recipe.json").read_bytes() == "ä".encode()
    assert names(tmp_path / "a" / "b") == ["recipe.json"]


def test_nothing_is_visible_before_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent  # the same file system, or the rename would be a copy
    assert target.read_text() == "new"
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize("crash", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_crash_leaves_the_old_file_and_no_temporary(tmp_path: Path, crash: type[BaseException]) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    with pytest.raises(crash):
        write_and_fail(target, crash())
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.json"]


def test_a_crash_leaves_the_old_folder_and_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    fill(target, "old")
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(target, ZeroDivisionError())
    assert (target / "deep" / "file").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_a_folder_replaces_a_folder_and_nothing_of_the_old_stays(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    fill(target, "old")
    (target / "left over").write_text("")
    with atomic_path(target) as temporary:
        fill(temporary, "new")
    assert (target / "deep" / "file").read_text() == "new"
    assert names(target) == ["deep"]
    assert names(tmp_path) == ["bundle"]


def test_what_a_killed_run_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    fill(target, "old")
    fill(tmp_path / ".bundle.partial", "half")
    fill(tmp_path / ".bundle.retired", "older")
    with atomic_path(target) as temporary:
        assert not temporary.exists()
        fill(temporary, "new")
    assert (target / "deep" / "file").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


def half_replaced(target: Path) -> None:
    """Leave what a kill between the two renames leaves."""
    fill(target.with_name(f".{target.name}.partial"), "new")
    fill(target.with_name(f".{target.name}.retired"), "old")


@pytest.mark.parametrize(("removed", "content"), [(None, "new"), ("partial", "old")])
def test_a_replacement_that_a_kill_cut_in_two_is_finished(tmp_path: Path, removed: str | None, content: str) -> None:
    target = tmp_path / "bundle"
    half_replaced(target)
    if removed:
        shutil.rmtree(tmp_path / f".bundle.{removed}")
    finish_replacement(target)
    finish_replacement(target)
    assert (target / "deep" / "file").read_text() == content
    assert names(tmp_path) == ["bundle"]


def test_the_next_write_finishes_the_replacement_before_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    half_replaced(target)
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(target, ZeroDivisionError())
    assert (target / "deep" / "file").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


def test_a_folder_whose_replacement_cannot_be_renamed_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    fill(target, "old")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ArtifactError, match="Input/output error"), atomic_path(target) as temporary:
        fill(temporary, "new")
    assert (target / "deep" / "file").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_the_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        atomic_write,
        "os",
        SimpleNamespace(
            open=os.open,
            close=os.close,
            O_RDONLY=os.O_RDONLY,
            fsync=lambda descriptor: (events.append("sync"), sync(descriptor)),
        ),
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("replace"), replace(self, to))[1])
    write_text(tmp_path / "x", "text")
    assert events == ["sync", "replace"]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    fill(target, "mine")
    with pytest.raises(ArtifactError, match="is a folder, and a file is to be written; give a file name"):
        write_text(target, "new")
    assert (target / "deep" / "file").read_text() == "mine"
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("place", [".", "/"])
def test_a_folder_without_a_name_is_not_replaced(place: str) -> None:
    with pytest.raises(ArtifactError, match="this folder cannot be replaced; give a name in it"):
        write_text(Path(place), "")


def test_a_parent_that_is_a_file_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x.json", tmp_path / "file" / "deeper" / "x.json"):
        with pytest.raises(ArtifactError, match="a part of this path is a file, not a folder; choose another"):
            write_text(target, "")
    assert names(tmp_path) == ["file"]


def test_a_write_that_was_cut_short_for_no_known_reason_has_a_remedy_too(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught, atomic_path(tmp_path / "a"):
        raise OSError("4096 requested and 0 written")  # as numpy does
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: cannot write: 4096 requested and 0 written; the disk is probably full: free space there or "
        "choose another place"
    )


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "the disk is full; free space there or choose another place"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EACCES, "permission denied; choose a place you may write to"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_is_one_line_with_the_remedy(tmp_path: Path, code: int, remedy: str) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    with pytest.raises(ArtifactError) as caught:
        write_and_fail(target, OSError(code, os.strerror(code)))
    assert str(caught.value).startswith(f"{target}: cannot write: {remedy}")
    assert "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.json"]


def test_two_writers_of_one_shared_artifact_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    with atomic_path(path, shared=True) as first:
        first.write_bytes(b"first")
        with atomic_path(path, shared=True) as second:
            second.write_bytes(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["timing.cache"]
