"""Engines from the command line: one plan or two, kept or built again, alone and at the end of the main job."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from spike_export.engines.build import reuse as plan_reuse
from spike_export.engines.plan.backend import TENSORRT_RTX
from spike_export.engines.plan.sidecar import load_sidecar, sidecar_path
from tests.support.tiny.bundles import TinyModel, write_bundle
from tests.support.tiny.cli_models import SMALL, Outcome, call, write_corpus, write_model

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(TENSORRT_RTX.module) is None,
        reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
    ),
    pytest.mark.usefixtures("one_thread", "blank_pictures"),
]

RTX = ("--backend", "tensorrt-rtx", "--target", "SM86")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_build_splits_keeps_and_tells_what_changed(tmp_path: Path) -> None:
    bundle, folder = write_bundle(tmp_path / "bundle"), tmp_path / "engine"

    def build(*options: str) -> Outcome:
        done = call("build", bundle, "--out", folder / "e.plan", *RTX, *options)
        assert done.code == 0, done.err
        return done

    split = ("--profiles", "split", "--max-batch", "4", "--typical-batch", "2", "--max-prompt", "32")
    lines = build(*split).out.splitlines()
    plans = [folder / "e.prefill.plan", folder / "e.decode.plan"]
    assert lines[-3:] == ["plan built", *(f"plan: {plan} (as asked for)" for plan in plans)]
    assert files(folder) == {"e.prefill.plan", "e.prefill.json", "e.decode.plan", "e.decode.json"}
    prefill, decode = (load_sidecar(plan).profiles[0].inputs["input_ids"] for plan in plans)
    assert (prefill.min, prefill.opt, prefill.max) == ((1, 1), (2, 32), (4, 32))
    assert (decode.min, decode.opt, decode.max) == ((1, 1), (2, 1), (4, 1))
    before = [plan.read_bytes() for plan in plans]
    assert "plan kept: nothing it was built from has changed" in build(*split).out.splitlines()
    assert [plan.read_bytes() for plan in plans] == before
    assert "plan built again: as asked for" in build(*split, "--force").out.splitlines()
    write_bundle(bundle, TinyModel(seed=1))
    told = build(*split, "--optimization-level", "5").out.splitlines()
    assert "plan built again: bundle changed; optimization level 3 -> 5" in told


def test_what_the_compiler_warns_of_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = plan_reuse.ProvidedEngine((), (), "built", reused=False, warnings=("weights\n\x1b overflow",))
    monkeypatch.setattr("spike_export.pipeline.build.provide_engine", lambda *_, **__: built)
    done = call("build", tmp_path, "--out", tmp_path / "e.plan")
    assert (done.code, done.out.splitlines()[-2:]) == (
        0,
        ["the compiler warns: weights \\x1b overflow", "plan built"],
    )


def test_a_kept_plan_that_deviates_is_still_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", TinyModel(wrong_axis=("model.layers.0.mlp.up_proj",), hidden=128))
    arguments = ("build", bundle, "--out", tmp_path / "e.plan", *RTX, "--profiles", "decode")
    for note in ("plan built", "plan kept"):
        done = call(*arguments)
        assert done.code == 1
        assert note in done.out
        assert (
            "model.layers.0.mlp.up_proj does not run in the planned precision; see `spike-export inspect " in done.err
        )
        assert f"inspect {tmp_path / 'e.plan'}`; accept the plan with --allow-fallback" in done.err
    assert call(*arguments, "--allow-fallback").code == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("job")
    write_model(folder / "model")
    write_corpus(folder / "corpus.txt")
    return folder, job(folder, "--profiles", "split")


def job(folder: Path, *options: str) -> Outcome:
    base = (folder / "model", "--out", folder / "e.plan", "--corpus", folder / "corpus.txt", *SMALL, "--no-quantize")
    done = call(*base, *RTX, *options)
    assert done.code == 0, done.err
    return done


def test_the_main_job_ends_with_a_split_engine(finished: tuple[Path, Outcome]) -> None:
    folder, done = finished
    run = folder / "e.plan.run"
    places = [f"plan: {folder / name}" for name in ("e.prefill.plan", "e.decode.plan")]
    assert done.out.splitlines()[-6:] == [
        "plan built",
        *places,
        f"bundle: {run / 'bundle'}",
        f"report: {run / 'report.html'}",
        f"serve it: spike-export serve {run / 'bundle'}",
    ]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "e.prefill.profiles" in page
    assert "e.decode.profiles" in page
    assert "No engine has been built yet." not in page


def test_the_main_job_keeps_or_builds_again_and_says_why(finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    again = job(tmp_path, "--profiles", "split")
    # The stage compares what the engine was built from, and builds nothing.
    assert "plan kept: nothing it was built from has changed" in again.out.splitlines()
    assert again.stages_run == ("plan", "report")
    one = job(tmp_path, "--profiles", "decode")
    assert one.stages_run == ("plan", "report")
    assert "plan built again: profiles prefill+decode -> decode; a plan per profile yes -> no" in one.out.splitlines()
    assert files(tmp_path) == {"corpus.txt", "e.plan", "e.json"}


def test_the_main_job_does_not_take_another_bundle_s_plan_for_its_own(
    finished: tuple[Path, Outcome], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    job(tmp_path, "--profiles", "decode")
    own = load_sidecar(tmp_path / "e.plan").bundle_sha256
    other = write_bundle(tmp_path / "other")
    options = ("--profiles", "decode", "--optimization-level", "5")
    assert call("build", other, "--out", tmp_path / "e.plan", *RTX, *options).code == 0
    assert load_sidecar(tmp_path / "e.plan").bundle_sha256 != own
    told = job(tmp_path, "--profiles", "decode").out
    assert "plan built again: bundle changed; " in told
    assert "optimization level 5 -> 3" in told
    assert load_sidecar(tmp_path / "e.plan").bundle_sha256 == own


def test_the_main_job_builds_a_truncated_plan_again(finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    job(tmp_path, "--profiles", "split")
    plan = tmp_path / "e.decode.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    again = job(tmp_path, "--profiles", "split")
    assert again.stages_run == ("plan", "report")
    assert "belongs to a plan of" in again.out
    assert load_sidecar(plan)
    assert sidecar_path(plan).is_file()
