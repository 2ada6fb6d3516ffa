"""`calibrate --shard` and `merge`: the parts measured apart are the whole, byte for byte; what is missing is named."""

import json
import shutil
from pathlib import Path

import pytest

from spike_export.artifacts.recipe import load_recipe
from tests.support.tiny.cli_models import Outcome, artifacts, call, write_inputs, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, SHARDS = 7, 3
OPTIONS = ("--samples", str(SAMPLES), "--length", "32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus, a run in one piece (`whole`) and three shards (`1`, `2`, `3`)."""
    folder = write_inputs(tmp_path_factory.mktemp("shards"))
    assert calibrated(folder, folder / "whole").code == 0
    for index in range(1, SHARDS + 1):
        done = calibrated(folder, folder / str(index), "--shard", f"{index}/{SHARDS}")
        assert done.code == 0, done.err
        assert done.stages_run == ("spikes",)
        assert done.out.splitlines()[-1] == (
            f"statistics of shard {index}/{SHARDS}: {folder / str(index) / 'spikes.json'}"
        )
    return folder


def calibrated(folder: Path, work_dir: Path, *options: str) -> Outcome:
    corpus = ("--corpus", folder / "corpus.txt")
    return call("calibrate", folder / "model", "--work-dir", work_dir, *corpus, *OPTIONS, *options)


def shards(folder: Path, *indices: int) -> list[Path]:
    return [folder / str(index) for index in indices]


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_merged_shards_are_a_run_in_one_piece(folder: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    merged = call("merge", *shards(folder, *order), "--work-dir", tmp_path / "m")
    assert (merged.code, merged.err) == (0, "")
    assert merged.out == f"{SAMPLES} windows of {SHARDS} shards: {tmp_path / 'm' / 'spikes.json'}\n"
    resumed = calibrated(folder, tmp_path / "m")
    assert "spikes" not in resumed.stages_run
    assert "recipe" in resumed.stages_run
    whole, ours = artifacts(folder / "whole"), artifacts(tmp_path / "m")
    assert ours["spikes.safetensors"] == whole["spikes.safetensors"]
    assert load_recipe(tmp_path / "m" / "recipe.json") == load_recipe(folder / "whole" / "recipe.json")
    assert [name for name in whole if whole[name] != ours.get(name)] == []


def test_a_shard_leaves_no_choice_behind(folder: Path) -> None:
    assert set(artifacts(folder / "2")) == {"spikes.json", "spikes.safetensors", ".stages/spikes.json"}


def test_a_shards_statistics_are_no_whole_runs(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "1", tmp_path / "w")
    assert "spikes" in calibrated(folder, tmp_path / "w").stages_run
    assert artifacts(tmp_path / "w")["spikes.safetensors"] == artifacts(folder / "whole")["spikes.safetensors"]


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    line = call("merge", *shards(folder, 1, 3), "--work-dir", tmp_path / "m").error
    assert "2 of 7 windows are missing, the first is 1" in line
    assert "merge all shards" in line
    assert not (tmp_path / "m").exists()


def test_a_folder_without_statistics(folder: Path, tmp_path: Path) -> None:
    line = call("merge", *shards(folder, 1, 2), tmp_path, "--work-dir", tmp_path / "m").error
    assert str(tmp_path / "spikes.json") in line
    assert "calibrate again" in line


def test_a_shard_of_other_options(folder: Path, tmp_path: Path) -> None:
    assert calibrated(folder, tmp_path / "other", "--seed", "1", "--shard", "3/3").code == 0
    line = call("merge", *shards(folder, 1, 2), tmp_path / "other", "--work-dir", tmp_path / "m").error
    assert f"{tmp_path / 'other'}: model, corpus or options differ from those of {folder / '1'}; calibrate all" in line


def test_a_shard_of_another_model(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=7)
    shutil.copy(folder / "corpus.txt", tmp_path)
    assert calibrated(tmp_path, tmp_path / "other", "--shard", "3/3").code == 0
    line = call("merge", *shards(folder, 1, 2), tmp_path / "other", "--work-dir", tmp_path / "m").error
    assert "model, corpus or options differ" in line


def test_a_shard_given_twice(folder: Path, tmp_path: Path) -> None:
    line = call("merge", *shards(folder, 1, 2, 2, 3), "--work-dir", tmp_path / "m").error
    assert "window 1 is in more than one of the spike statistics; merge each shard once" in line


def test_shards_of_different_divisions_overlap(folder: Path, tmp_path: Path) -> None:
    assert calibrated(folder, tmp_path / "half", "--shard", "2/2").code == 0
    line = call("merge", *shards(folder, 1), tmp_path / "half", "--work-dir", tmp_path / "m").error
    assert "is in more than one of the spike statistics" in line


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("samples", None, "does not say of which calibration"),
        ("samples", 10**12, "samples"),
        ("model", "x", "model"),
        ("corpus", None, "does not say of which calibration"),
        ("modules", {"m": {"top_tokens": 3}}, "top_tokens"),
    ],
)
def test_a_description_with_odd_values(folder: Path, tmp_path: Path, key: str, value: object, reason: str) -> None:
    shutil.copytree(folder / "1", tmp_path / "1")
    path = tmp_path / "1" / "spikes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    line = call("merge", tmp_path / "1", *shards(folder, 2, 3), "--work-dir", tmp_path / "m").error
    assert str(path) in line
    assert reason in line


def test_nothing_to_merge(tmp_path: Path) -> None:
    line = call("merge", "--work-dir", tmp_path / "m").error
    assert "shards" in line.lower()
    assert not (tmp_path / "m").exists()


def test_a_damaged_shard(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "2", tmp_path / "2")
    (tmp_path / "2" / "spikes.safetensors").write_bytes(b"half")
    line = call("merge", folder / "1", tmp_path / "2", folder / "3", "--work-dir", tmp_path / "m").error
    assert str(tmp_path / "2" / "spikes") in line
    assert "calibrate again" in line
