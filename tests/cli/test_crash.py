"""A fault of the program ends in one line, a file with the traceback, and exit code 3."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import pytest

from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.plan.backend import Machine
from tests.support.tiny.bundles import write_bundle
from tests.support.tiny.cli_models import Outcome, call

SECRET = "hf_a_token_that_nobody_may_see"

PLANTED = """
import sys
from spike_export.{file} import {name}
import spike_export.{file} as file

def planted(*arguments, **options):
    secret = {secret!r}
    raise {error}

file.{name} = planted
from spike_export.cli.main import main
main()
"""


class PanicError(BaseException):
    """As tokenizers' PanicException: no Exception."""


def failing(error: BaseException) -> Callable[..., NoReturn]:
    def planted(*_: object, **__: object) -> NoReturn:
        raise error

    return planted


def endless(*_: object, **__: object) -> NoReturn:
    endless()
    raise AssertionError


def crash_file(outcome: Outcome) -> Path:
    """The file that the only line on standard error names."""
    assert (outcome.code, outcome.err.count("\n")) == (3, 1), outcome
    found = re.fullmatch(
        r"spike-export: this is a fault of the program, not of its input \(.*\); the traceback is in (.*)\n",
        outcome.err,
    )
    assert found, outcome.err
    return Path(found[1])


@pytest.fixture
def merge_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Plants an error into a command that has a work directory."""
    return lambda error: monkeypatch.setattr("spike_export.pipeline.cluster.shard_merge.merge_shards", failing(error))


def process(file: str, name: str, error: str, *arguments: str, **environment: str) -> Outcome:
    """Run the command line in a process of its own, in which a function fails."""
    code = PLANTED.format(file=file, name=name, error=error, secret=SECRET)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_TOKEN": SECRET, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_the_main_job_leaves_the_traceback_in_its_work_directory(tmp_path: Path) -> None:
    out = tmp_path / "engine.plan"
    done = process("pipeline.run_job", "open_pipeline", "AttributeError('no key')", "model", "--out", str(out))
    file = crash_file(done)
    assert file.parent == tmp_path / "engine.plan.run"
    assert "(AttributeError: no key)" in done.err
    text = file.read_text()
    assert text.rstrip().endswith("AttributeError: no key")
    assert "raise AttributeError('no key')" in text or "in planted" in text
    for package in ("spike-export", "torch", "transformers", "onnxruntime"):
        assert f"{package} {version(package)}\n" in text
    assert f"Python {sys.version.split()[0]}\n" in text
    assert "\nplatform " in text
    assert SECRET not in text + done.err + done.out


def test_a_command_without_a_work_directory_leaves_it_in_the_temporary_folder(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    planted = ("engines.lint.linter", "lint_model", "ZeroDivisionError")
    done = process(*planted, "check", "model.onnx", "--lint", TMPDIR=str(tmp_path / "tmp"))
    assert crash_file(done).parent == tmp_path / "tmp"


@pytest.mark.parametrize(
    "error",
    [
        KeyError("key"),
        RecursionError(),
        MemoryError(),
        AssertionError(),
        PanicError("Once instance"),
        ValueError("a\nb"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_kind_of_fault_is_caught(
    error: BaseException, merge_fails: Callable[[BaseException], None], tmp_path: Path
) -> None:
    merge_fails(error)
    done = call("merge", "part", "--work-dir", tmp_path / "run")
    assert crash_file(done).parent == tmp_path / "run"
    assert type(error).__name__ in done.err
    assert type(error).__name__ in crash_file(done).read_text()


def test_a_recursion_without_end_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spike_export.pipeline.cluster.shard_merge.merge_shards", endless)
    done = call("merge", "part", "--work-dir", tmp_path / "run")
    text = crash_file(done).read_text()
    assert "RecursionError" in text
    assert text.count("in endless") < 100


def test_a_second_crash_keeps_the_first(merge_fails: Callable[[BaseException], None], tmp_path: Path) -> None:
    files = []
    for number in range(4):  # most of them in one second
        merge_fails(ValueError(f"fault {number}"))
        files.append(crash_file(call("merge", "part", "--work-dir", tmp_path)))
    assert len(set(files)) == 4
    assert [file.read_text().splitlines()[-1] for file in files] == [f"ValueError: fault {n}" for n in range(4)]


def test_a_place_that_cannot_be_written_gives_way_to_the_temporary_folder(
    merge_fails: Callable[[BaseException], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_fails(ValueError("fault"))
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    done = call("merge", "part", "--work-dir", tmp_path / "file" / "run")
    assert crash_file(done).parent == tmp_path / "tmp"
    assert (tmp_path / "file").read_text() == ""


def test_without_any_place_the_traceback_is_printed(
    merge_fails: Callable[[BaseException], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_fails(ValueError("fault"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    done = call("merge", "part", "--work-dir", tmp_path / "file" / "run")
    assert done.code == 3
    assert done.err.startswith("Traceback (most recent call last)")
    assert done.err.endswith("(ValueError: fault); the traceback is above, no file could be written\n")


@pytest.mark.parametrize("place", ["option", "file"])
def test_debug_shows_the_traceback_at_once(
    place: str, merge_fails: Callable[[BaseException], None], tmp_path: Path
) -> None:
    merge_fails(ValueError("fault"))
    (tmp_path / "job.toml").write_text("[merge]\ndebug = true\n")
    given = ("--debug",) if place == "option" else ("--config", tmp_path / "job.toml")
    done = call("merge", "part", "--work-dir", tmp_path, *given)
    assert done.code == 3
    assert "in planted" in done.err
    (file,) = tmp_path.glob("crash-*.txt")
    assert done.err.splitlines()[-1].endswith(f"the traceback is in {file}")


def test_a_fault_in_the_build_process_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = '{"event": "fault", "message": "KeyError: x", "traceback": "in planted"}'
    machine = Machine(frozenset({"tensorrt-rtx"}), gpu=None)
    environment = BuildEnvironment(machine, None, ("sh", "-c", f"read request; echo '{event}'"))
    monkeypatch.setattr("spike_export.engines.build.reuse.detect_environment", lambda: environment)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bundle = write_bundle(tmp_path / "bundle")
    done = call("build", bundle, "--out", tmp_path / "engine.plan", "--target", "SM86")
    assert "(BuildFaultError: KeyError: x)" in done.err
    assert "in planted" in crash_file(done).read_text()
    assert not list(tmp_path.glob("*engine*"))


COMMANDS = ("calibrate", "merge", "inspect", "export", "check", "build", "generate", "serve", "bench", "report")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_debug(command: str) -> None:
    assert "--debug" in call(*filter(None, [command]), "--help").out


def test_bad_input_and_an_interruption_are_no_faults(
    merge_fails: Callable[[BaseException], None], tmp_path: Path
) -> None:
    assert call("merge", "part", "--work-dir", tmp_path, "--debug").code == 2
    merge_fails(KeyboardInterrupt())
    assert call("merge", "part", "--work-dir", tmp_path).code == 130
    merge_fails(PermissionError(13, "Permission denied", "place"))
    assert call("merge", "part", "--work-dir", tmp_path).error == "spike-export: error: place: Permission denied"
    merge_fails(SystemExit(5))
    with pytest.raises(SystemExit):
        call("merge", "part", "--work-dir", tmp_path)
    assert list(tmp_path.glob("crash-*")) == []
