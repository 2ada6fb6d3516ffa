"""One process at a time writes to a place, and a dead one holds nothing."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.files import sole_writer as module
from spike_export.artifacts.files.sole_writer import lock_beside, sole_writer
from spike_export.artifacts.manifest import load_manifest

HOLD = """
import sys
from pathlib import Path
from spike_export.artifacts.files.sole_writer import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(place: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that writes to a place until its input ends."""
    command = [sys.executable, "-c", HOLD, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def refusal(place: Path) -> str:
    with pytest.raises(ArtifactError) as caught, sole_writer(place):
        pass
    return str(caught.value)


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    with holder(place) as process:
        pattern = (
            rf"{re.escape(str(place))}: in use by process {process.pid} on {re.escape(socket.gethostname())} since "
            rf"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC \(-c {re.escape(str(place))}\); wait until that process has ended, "
            r"or give another place"
        )
        process.send_signal(signal.SIGSTOP)  # asleep, and alive
        assert re.fullmatch(pattern, refusal(place))
        process.send_signal(signal.SIGCONT)
        with sole_writer(tmp_path / "another"):
            pass
        process.communicate()  # its input ends
        with sole_writer(place):
            assert lock_beside(place).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_holds_nothing(tmp_path: Path, death: signal.Signals) -> None:
    place = tmp_path / "bundle"
    with holder(place) as process:
        process.send_signal(death)
        process.wait()
    assert lock_beside(place).exists()
    with sole_writer(place):
        assert str(os.getpid()) in refusal(place)
    assert list(tmp_path.iterdir()) == []


def test_many_writers_never_meet(tmp_path: Path) -> None:
    place, inside, refused = tmp_path / "run", tmp_path / "inside", []

    def write() -> None:
        done = 0
        while done < 10:
            try:
                with sole_writer(place):
                    inside.touch(exist_ok=False)  # fails if another one is inside
                    inside.unlink()
                    done += 1
            except ArtifactError as error:
                refused.append(str(error))

    faults: list[Any] = []
    hook, threading.excepthook = threading.excepthook, faults.append
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threading.excepthook = hook
    assert faults == []
    assert all("in use by" in message for message in refused)


def test_a_lock_file_that_its_owner_has_just_removed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, flock, removed = lock_beside(tmp_path / "run"), fcntl.flock, []

    def after_the_owner_left(descriptor: int, how: int) -> None:
        if not removed:
            removed.append(file.unlink())
        flock(descriptor, how)

    monkeypatch.setattr(module.fcntl, "flock", after_the_owner_left)
    with sole_writer(tmp_path / "run"):
        assert file.exists()
        assert "in use by" in refusal(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "[" * 100_000])
def test_an_owner_that_has_not_named_itself_is_another_process(tmp_path: Path, content: str) -> None:
    place = tmp_path / "run"
    with sole_writer(place):
        lock_beside(place).write_text(content)
        assert refusal(place).startswith(f"{place}: in use by another process; wait")


def test_what_was_refused_leaves_no_folder(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "bundle"
    with pytest.raises(ZeroDivisionError), sole_writer(place):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with sole_writer(place):
        place.mkdir()
    assert list((tmp_path / "a" / "b").iterdir()) == [place]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "a part of this path is a file, not a folder" in refusal(tmp_path / "file" / "bundle")
    assert "this folder cannot be replaced; give a name in it" in refusal(Path())


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    lock_beside(tmp_path / "bundle").symlink_to(tmp_path / "mine")
    assert "cannot write" in refusal(tmp_path / "bundle")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_system_without_locks_is_written_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with sole_writer(tmp_path / "run"):
        (tmp_path / "run").touch()


def test_a_reader_finishes_what_a_dead_writer_began_and_waits_for_a_living_one(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    for name in (".bundle.partial", ".bundle.retired"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    with sole_writer(bundle), pytest.raises(ArtifactError, match=r"bundle: in use by process"):
        load_manifest(bundle)
    with pytest.raises(ArtifactError, match="Invalid JSON"):
        load_manifest(bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (bundle / "manifest.json").read_text() == ".bundle.partial"
