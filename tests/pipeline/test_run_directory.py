"""The work directory: keys and stamps of stages, documents that a hand may edit, the lock, the scratch folder."""

import os
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import pytest
from pydantic import BaseModel

from spike_export.artifacts.errors import ArtifactError
from spike_export.pipeline import run_directory
from spike_export.pipeline.run_directory import RunDirectory, stage_key

NAME = "recipe.json"


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any = 0


class Model(BaseModel):
    path: Path = Path("a")
    number: int = 1


def function() -> None:
    """Part of a key."""


def test_a_stage_key_is_the_same_in_every_process() -> None:
    program = (
        "from spike_export.calibration.methods.options import CalibrationOptions\n"
        "from spike_export.pipeline.run_directory import stage_key\n"
        "names = frozenset({'input_layernorm', 'q_norm', 'k_norm', 'post_attention_layernorm'})\n"
        "print(stage_key(options=CalibrationOptions(), norms=names, function=stage_key))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("value", "kind"), [(object(), "object"), (Pair, "type"), (Pair(object()), "object"), (sys, "module")]
)
def test_a_key_refuses_what_has_no_text_of_its_own(value: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"^{kind} cannot be part of a stage's key$"):
        stage_key(model=value)


@pytest.mark.parametrize(
    ("value", "alike"),
    [
        (Pair(1, 2), {"first": 1, "second": 2}),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (Model(number=3), {"path": "a", "number": 3}),
        ({"b", "a"}, ["a", "b"]),
        (frozenset({"b", "a"}), ["a", "b"]),
        (PurePosixPath("a/b"), "a/b"),
        (function, f"{__name__}.function"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (Pair([{Path("c")}]), {"first": [["c"]], "second": 0}),
    ],
)
def test_what_a_value_stands_for_in_a_key(value: Any, alike: Any) -> None:
    assert stage_key(value=value) == stage_key(value=alike)


def test_other_inputs_have_another_key() -> None:
    values = (1, "1", None, [1], {"a": 1}, Pair(1), Pair(2), Model(), Model(number=2), function, Path("b"))
    keys = {stage_key(a=value) for value in values} | {stage_key(), stage_key(b=1), stage_key(a=1, b=1)}
    assert len(keys) == len(values) + 3
    assert all(len(key) == 64 for key in keys)


def test_a_stage_is_done_only_with_its_stamp_its_key_and_its_artifacts(tmp_path: Path) -> None:
    run, artifact = RunDirectory(tmp_path), tmp_path / "a"
    key = stage_key(seed=1)
    artifact.touch()
    assert not run.is_done("one two", key, [artifact])
    run.begin("one two")  # there is nothing to forget
    run.mark_done("one two", key)
    assert run.is_done("one two", key, [artifact])
    assert (tmp_path / ".stages" / "one-two.json").read_text() == f'{{"key": "{key}"}}\n'
    assert not run.is_done("one two", stage_key(seed=2), [artifact])
    assert not run.is_done("two", key, [artifact])
    forced = RunDirectory(tmp_path, force=True)
    assert (forced.is_done("one two", key, [artifact]), forced.is_stamped("one two", key)) == (False, True)
    assert not run.is_done("one two", key, [artifact, tmp_path / "b"])
    run.begin("one two")
    assert not run.is_done("one two", key, [artifact])
    for damaged in ("", "[]", '{"key": 3}', "\udc80"):
        (tmp_path / ".stages" / "one-two.json").write_bytes(damaged.encode("utf-8", "surrogateescape"))
        assert not run.is_done("one two", key, [artifact])


def test_the_lock_is_in_the_folder_and_names_the_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run.sole_writer():
        assert [path.name for path in run.path.iterdir()] == [".lock"]
        with pytest.raises(ArtifactError, match=f"^{run.path}: in use by"), run.sole_writer():
            pass
    assert not (run.path / ".lock").exists()


def test_only_a_runs_own_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    run = RunDirectory(tmp_path)
    run.require_own(["a"])
    with pytest.raises(ArtifactError, match=f"^{tmp_path / 'b'}: exists and is not part of a run that spike-export"):
        run.require_own(["a", "b"])
    RunDirectory(tmp_path, overwrite=True).require_own(["b"])
    run.mark_done("stage", "key")
    run.require_own(["b"])


def test_a_document_is_edited_where_another_hand_wrote_it(tmp_path: Path) -> None:
    run, document = RunDirectory(tmp_path), tmp_path / NAME
    assert not run.is_edited(NAME)
    document.write_text("by hand")
    assert run.is_edited(NAME)
    run.write_editable(NAME, "first ä")
    assert (document.read_text(encoding="utf-8"), run.is_edited(NAME)) == ("first ä", False)
    run.write_editable(NAME, "second")
    assert not run.is_edited(NAME)
    document.write_text("first ä", encoding="utf-8")  # of an earlier run: the user has put it back
    assert run.is_edited(NAME)
    run.discard(NAME)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [f"{NAME}.old"]
    assert not run.is_edited(NAME)
    document.mkdir()
    assert not run.is_edited(NAME)


@pytest.mark.parametrize("survives", [1, 2])
def test_a_run_that_is_killed_while_it_writes_a_document_knows_both_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    run, written, write_text = RunDirectory(tmp_path), [], run_directory.write_text
    run.write_editable(NAME, "before")

    def killed(path: Path, text: str) -> None:
        if len(written) == survives:
            raise KeyboardInterrupt
        written.append(path)
        write_text(path, text)

    monkeypatch.setattr(run_directory, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        run.write_editable(NAME, "after")
    assert (tmp_path / NAME).read_text() == ["before", "after"][survives - 1]
    for text, edited in (("before", False), ("after", False), ("other", True)):
        (tmp_path / NAME).write_text(text)
        assert run.is_edited(NAME) is edited


@pytest.mark.parametrize("known", ["", "3", "{}", "[3, null]", "[" * 100_000, "\udc80"])
def test_without_a_readable_hash_a_document_counts_as_edited(tmp_path: Path, known: str) -> None:
    run = RunDirectory(tmp_path)
    run.write_editable(NAME, "text")
    hashes = tmp_path / ".stages" / f"{NAME}.sha256"
    assert hashes.read_text() == f'["{sha256(b"text").hexdigest()}"]\n'
    hashes.write_bytes(known.encode("utf-8", "surrogateescape"))
    assert run.is_edited(NAME)


def test_scratch_starts_empty_and_leaves_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new" / "run")
    with run.scratch() as folder:
        assert folder == run.path / ".scratch"
    left = folder / "logits" / "0.npy"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a killed run")
    with run.scratch() as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
    assert list(run.path.iterdir()) == []


def test_scratch_is_removed_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunDirectory(tmp_path).scratch():
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_something_else_has_removed_ends_well(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).scratch() as folder:
        folder.rmdir()
