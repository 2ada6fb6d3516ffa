"""Whatever a file of a finished run, its bundle, its model or its text holds, a command does its work or says one line.

Readers are fuzzed one by one in `test_readers.py`; here a value that no reader looks at reaches the code that uses it.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.fuzz.damage import damaged_bytes, damaged_graph, json_text
from tests.fuzz.tally import Tally
from tests.fuzz.test_readers import KEPT, MEMORY, OF_COMMANDS, limited_memory, limited_time
from tests.support.tiny.cli_models import SMALL, Outcome, call, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")

EXAMPLES = 12

PATIENCE = 60
"""Seconds of processor time for one command."""

PLACES = ("model", "corpus.txt", "run", "bundle", "other")
"""Files and folders of a job; the first word of a path in `COMMANDS`."""


class Command(NamedTuple):
    """A command in a folder with the inputs and the results of a small job, and where the files lie that it reads."""

    arguments: tuple[str, ...]
    reads: tuple[str, ...]


COMMANDS: Mapping[str, Command] = {
    "calibrate": Command(
        ("calibrate", "model", "--work-dir", "run", "--corpus", "corpus.txt", *SMALL), ("model", "corpus.txt", "run")
    ),
    "export": Command(
        ("export", "model", "--recipe", "run/recipe.json", "--out", "other"), ("model", "run/recipe.json")
    ),
    "export again": Command(("export", "model", "--recipe", "run/recipe.json", "--out", "bundle"), ("model", "bundle")),
    "check": Command(
        ("check", "bundle", "--reference", "model", "--corpus", "corpus.txt", "--length", "16"),
        ("bundle", "model", "corpus.txt"),
    ),
    "lint": Command(("check", "bundle", "--lint"), ("bundle",)),
    "generate": Command(("generate", "bundle", "--prompt", "abc", "--max-new-tokens", "2"), ("bundle",)),
    "inspect bundle": Command(("inspect", "bundle"), ("bundle",)),
    "inspect run": Command(("inspect", "run"), ("run",)),
    "report": Command(("report", "run"), ("run",)),
}

DONE: Mapping[str, tuple[int, ...]] = {"lint": (0, 1)}
"""Command → exit codes of one that did its work, where these are not 0 alone: the linter found an error."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("finished"))
    for name in ("calibrate", "export again"):
        done = run(folder, name)
        assert done.code == 0, done.err
    return folder


def run(folder: Path, name: str) -> Outcome:
    """Call a command on a folder."""
    words = COMMANDS[name].arguments
    return call(words[0], *(folder / word if word.split("/")[0] in PLACES else word for word in words[1:]))


@st.composite
def damage(draw: st.DrawFn, folder: Path) -> tuple[str, Path, bytes | None]:
    """Draw a command and the damaged content of a file that it reads; None for a file that is gone."""
    name = draw(st.sampled_from(tuple(COMMANDS)))
    tops = (folder / place for place in COMMANDS[name].reads)
    files = sorted(file for top in tops for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file())
    file = draw(st.sampled_from(files))
    return name, file.relative_to(folder), draw(_contents(file))


def _contents(file: Path) -> st.SearchStrategy[bytes | None]:
    content = file.read_bytes()
    others = st.one_of(damaged_bytes(content), st.none())
    if file.suffix == ".json":
        return st.one_of(json_text(json.loads(content)), json_text(json.loads(content)), others)
    if file.suffix == ".onnx":
        graphs = damaged_graph(onnx.load_from_string(content)).map(lambda model: model.SerializeToString())
        return st.one_of(graphs, graphs, others)
    return others


def test_a_command_does_its_work_or_says_one_line(
    finished: Path, record_property: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a fault of the program leaves its traceback
    tally = Tally("whole commands")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=not OF_COMMANDS,
        database=DirectoryBasedExampleDatabase(KEPT / "commands") if OF_COMMANDS else None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damage(finished))
    def one(damaged: tuple[str, Path, bytes | None]) -> None:
        name, file, content = damaged
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "copy"
            shutil.copytree(finished, folder)
            if content is None:
                (folder / file).unlink()
            else:
                (folder / file).write_bytes(content)
            try_one(folder, name, tally)

    try:
        with limited_memory(MEMORY):
            end = time.monotonic() + OF_COMMANDS
            one()
            while time.monotonic() < end:
                one()
    finally:
        record_property("fuzzed", tally.row)


def try_one(folder: Path, name: str, tally: Tally) -> None:
    """Run a command over damaged files, and count the outcome."""
    tally.failed += 1
    with limited_time(PATIENCE):
        done = run(folder, name)
    if done.code in DONE.get(name, (0,)):
        tally.accepted += 1
    else:
        assert done.code == 2, (name, done)
        assert "Traceback" not in done.err
        assert done.err.splitlines()[-1].startswith("spike-export: error: "), done.err
        tally.refused += 1
    tally.failed -= 1
