"""The main job from Python: stage by stage in ten lines, and as one function."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from spike_export import (
    BuildOptions,
    BundleInspection,
    CalibrationOptions,
    CorpusOptions,
    Engine,
    EngineInspection,
    EvaluationText,
    Job,
    Progress,
    RecipeError,
    RunInspection,
    StageCallback,
    build,
    calibrate,
    check,
    export,
    inspect,
    load_recipe,
    measure_shard,
    merge_shards,
    run_job,
)
from spike_export.engines.plan.backend import TENSORRT_RTX
from tests.support.tiny.cli_models import LENGTH, artifacts, call, write_inputs

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(TENSORRT_RTX.module) is None,
        reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
    ),
    pytest.mark.usefixtures("one_thread", "blank_pictures"),
]

CALIBRATION = CalibrationOptions(samples=4, length=LENGTH)
BUILD = BuildOptions(backend="tensorrt-rtx", targets=("SM86",))
COMMAND_LINE = ("--samples", "4", "--length", LENGTH)


class Stages(AbstractContextManager[Any]):
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __exit__(self, *_: object) -> None:
        self.told.append("end")

    def stage(self, name: str, /) -> AbstractContextManager[Progress]:
        self.told.append(name)
        return nullcontext(lambda *_: None)

    def skip(self, stage: str, reason: str, /) -> None:
        self.told.append(f"{stage} skipped: {reason}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("api"))


def test_ten_lines_do_what_the_commands_do(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, bundle, plan = folder / "model", folder / "bundle", folder / "engine.plan"
    corpus = CorpusOptions(folder / "corpus.txt")
    calibrated = calibrate(model, folder / "run", CALIBRATION, corpus=corpus)
    manifest = export(model, bundle, calibrated.recipe)
    accuracy = check(bundle, model, EvaluationText(corpus=corpus, samples=4, length=LENGTH), max_ppl_increase=1e9)
    engine = build(bundle, plan, BUILD) if accuracy.passed else None
    with Engine.open(bundle) as runtime:
        (answer,) = runtime.generate(["the"], max_new_tokens=2)
    assert capfd.readouterr() == ("", "")

    assert calibrated.recipe == load_recipe(calibrated.recipe_file)
    assert calibrated.statistics_file.exists()
    assert manifest.model.recipe_sha256
    assert accuracy.shipped is not None
    assert engine is not None
    assert engine.plans == (plan,)
    assert engine.complaint is None
    assert len(answer.token_ids) == 2
    inspected = inspect(plan), inspect(bundle), inspect(folder / "run")
    assert [type(each) for each in inspected] == [EngineInspection, BundleInspection, RunInspection]

    called = folder / "called"
    assert call("calibrate", model, "--work-dir", called, "--corpus", folder / "corpus.txt", *COMMAND_LINE).code == 0
    assert artifacts(called) == artifacts(folder / "run")
    assert call("export", model, "--recipe", called / "recipe.json", "--out", folder / "called_bundle").code == 0
    assert artifacts(folder / "called_bundle") == artifacts(bundle)


def test_one_function_runs_the_whole_job_and_does_nothing_twice(folder: Path) -> None:
    job = Job(
        str(folder / "model"),
        folder / "job.run",
        plan=folder / "job.plan",
        calibration=CALIBRATION,
        corpus=CorpusOptions(folder / "corpus.txt"),
        build=BUILD,
    )
    first, second = Stages(), Stages()
    result = run_job(job, display=first)
    assert result.engine is not None
    assert result.engine.plans == (job.plan,)
    assert result.report.exists()
    assert first.told[0] == "spikes"
    assert first.told[-3:] == ["plan", "report", "end"]
    again = run_job(job, display=second)
    assert [told for told in second.told if "skipped" not in told] == ["plan", "report", "end"]
    assert (again.recipe, again.check) == (result.recipe, result.check)


def test_shards_come_together(folder: Path) -> None:
    corpus, parts = CorpusOptions(folder / "corpus.txt"), [folder / "part1", folder / "part2"]
    for index, part in enumerate(parts, start=1):
        assert measure_shard(folder / "model", part, (index, 2), CALIBRATION, corpus=corpus).exists()
    assert merge_shards(parts, folder / "merged") == CALIBRATION.samples
    display = Stages()
    calibrate(folder / "model", folder / "merged", CALIBRATION, corpus=corpus, display=display)
    assert display.told[0] == "spikes skipped: same inputs"


def test_one_callback_hears_of_all_stages(folder: Path) -> None:
    told: list[str] = []
    corpus = CorpusOptions(folder / "corpus.txt")
    plain = CalibrationOptions(samples=4, length=LENGTH, qfep=False, smoothing=False)
    follow = StageCallback(lambda what, done, total: told.append(f"{what} {done}/{total}"))
    calibrate(folder / "model", folder / "callback", plain, corpus=corpus, display=follow)
    assert any(line.startswith("spikes: ") and line.endswith("4/4") for line in told)
    assert any(line.startswith("recipe: ") for line in told)


def test_what_cannot_work_is_refused_before_the_first_stage(folder: Path) -> None:
    display = Stages()
    with pytest.raises(RecipeError, match="takes at most"):
        calibrate(folder / "model", folder / "refused", CalibrationOptions(length=100_000), display=display)
    assert display.told == []
    with pytest.raises(RecipeError, match="max-ppl-increase"):
        check(folder / "bundle", folder / "model", max_ppl_increase=-1.0)
