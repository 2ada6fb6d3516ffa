"""Two commands never write to one place: the second one says who is there, and writes nothing."""

from pathlib import Path

import pytest

from spike_export.artifacts.files.sole_writer import sole_writer
from tests.support.tiny.cli_models import artifacts, call

RUN_LOCK = "engine.plan.run/.lock"

COMMANDS = {
    "main job, work directory": (RUN_LOCK, ("model", "--out", "engine.plan")),
    "main job, plan": (".engine.plan.lock", ("model", "--out", "engine.plan", "--work-dir", "other")),
    "calibrate": (RUN_LOCK, ("calibrate", "model", "--work-dir", "engine.plan.run")),
    "calibrate one shard": (RUN_LOCK, ("calibrate", "model", "--work-dir", "engine.plan.run", "--shard", "1/2")),
    "export": (".bundle.lock", ("export", "model", "--no-quantize", "--out", "bundle")),
    "build": (".engine.plan.lock", ("build", "bundle", "--out", "engine.plan")),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_place_in_use_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lock, arguments = COMMANDS[case]
    place = lock.removeprefix(".").removesuffix("/.lock").removesuffix(".lock")
    with sole_writer(Path(place), Path(lock)):
        before = artifacts(tmp_path)
        outcome = call(*arguments)
        assert outcome.error.startswith(f"spike-export: error: {place}: in use by process ")
        assert artifacts(tmp_path) == before
        assert not (tmp_path / "other").exists()
    (tmp_path / lock).parent.mkdir(exist_ok=True)
    (tmp_path / lock).write_text('{"pid": 1}')  # as a killed process leaves it
    assert "in use" not in call(*arguments).error
    assert not (tmp_path / lock).exists()
