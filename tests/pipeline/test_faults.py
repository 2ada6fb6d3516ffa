"""What goes wrong during a run is one line; old results stay whole, and the same call then ends as if nothing was."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from spike_export.artifacts.errors import ArtifactError, CheckpointError, SpikeExportError
from spike_export.artifacts.files import atomic_write
from spike_export.pipeline.calibrate import measure_shard
from spike_export.pipeline.pipeline import AFTER, BEHIND, BUNDLE, CHECK, PREFIX, RECIPE, SMOOTHING, SPIKES
from spike_export.pipeline.run_job import run_job
from spike_export.pipeline.stage_display import StageCallback
from tests.support.killed_runs import job
from tests.support.tiny.cli_models import artifacts, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread", "blank_pictures")

STAGES = {SPIKES, PREFIX, BEHIND, SMOOTHING, AFTER, RECIPE, BUNDLE, CHECK}


def run(inputs: Path, work_dir: Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
    """Run a small job without a plan."""
    display = StageCallback(progress)
    run_job(job(inputs / "model", inputs / "corpus.txt", work_dir, samples=2, length=24), display=display)


def measure(inputs: Path, progress: Callable[[str, int, int], None] = lambda *_: None, *, force: bool = False) -> None:
    """Run the first stage alone, on half of two windows."""
    work = job(inputs / "model", inputs / "corpus.txt", inputs / "run", samples=2, length=24)
    display = StageCallback(progress)
    measure_shard(work.model, work.work_dir, (1, 2), work.calibration, corpus=work.corpus, display=display, force=force)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus, and an undisturbed run."""
    folder = write_inputs(tmp_path_factory.mktemp("faults"))
    run(folder, folder / "whole")
    return folder


def test_ctrl_c_in_every_stage_changes_nothing(inputs: Path, tmp_path: Path) -> None:
    interrupted: set[str] = set()

    def interrupt_once(what: str, *_: int) -> None:
        stage = what.partition(": ")[0]
        if stage in STAGES - interrupted:
            interrupted.add(stage)
            raise KeyboardInterrupt

    for _ in STAGES:
        with pytest.raises(KeyboardInterrupt):
            run(inputs, tmp_path / "run", interrupt_once)
    run(inputs, tmp_path / "run", interrupt_once)
    assert interrupted == STAGES
    assert artifacts(tmp_path / "run") == artifacts(inputs / "whole")


def test_a_folder_that_vanishes_is_one_line_or_made_again(inputs: Path, tmp_path: Path) -> None:
    vanished: list[Path] = []

    def remove(what: str, *_: int) -> None:
        if what.startswith(SMOOTHING) and not vanished:
            vanished.append(tmp_path / "run")
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(SpikeExportError):
        run(inputs, tmp_path / "run", remove)
    run(inputs, tmp_path / "run", remove)
    assert artifacts(tmp_path / "run") == artifacts(inputs / "whole")


@pytest.fixture
def measured(inputs: Path, tmp_path: Path) -> Path:
    """A folder with a model, a corpus and the statistics of half of the windows."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    shutil.copy(inputs / "corpus.txt", tmp_path)
    measure(tmp_path)
    return tmp_path


def test_a_checkpoint_that_changes_is_noticed(measured: Path) -> None:
    (weights,) = (measured / "model").glob("*.safetensors")
    before = artifacts(measured / "run")

    def change(*_: object) -> None:
        os.utime(weights, (1, 1))

    with pytest.raises(CheckpointError, match="changed while it was in use; wait until the model is complete"):
        measure(measured, change, force=True)
    assert not (measured / "run" / ".stages" / "spikes.json").exists()
    measure(measured)
    assert artifacts(measured / "run") == before


def test_a_folder_that_turns_read_only_keeps_what_it_holds(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = artifacts(measured / "run")

    def refuse(_: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def turn(*_: object) -> None:
        monkeypatch.setattr(atomic_write, "_sync", refuse)

    with pytest.raises(ArtifactError, match="cannot write: the file system is read-only"):
        measure(measured, turn, force=True)
    monkeypatch.undo()
    kept = artifacts(measured / "run")
    assert {name: kept[name] for name in kept if not name.startswith(".")} == {
        name: before[name] for name in before if not name.startswith(".")
    }
    measure(measured)
    assert artifacts(measured / "run") == before
