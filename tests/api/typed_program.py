"""A user's program for mypy --strict, which `make test` runs on it: each call has the type that is stated here."""

from pathlib import Path
from typing import assert_type

from spike_export import (
    BuildOptions,
    BundleInspection,
    CacheOptions,
    CalibratedModel,
    CalibrationOptions,
    Check,
    CorpusOptions,
    Engine,
    EngineInspection,
    EvaluationText,
    ExecutionOptions,
    Job,
    JobResult,
    Manifest,
    ProvidedEngine,
    Recipe,
    RunInspection,
    SpikeExportError,
    StageCallback,
    build,
    calibrate,
    check,
    export,
    inspect,
    run_job,
)


def follow(what: str, done: int, total: int) -> None:
    print(what, done, total)


corpus = CorpusOptions("my_domain.jsonl")
calibrated = calibrate(
    "model",
    "run",
    CalibrationOptions(samples=4),
    corpus=corpus,
    execution=ExecutionOptions(devices=("cpu",)),
    display=StageCallback(follow),
)
assert_type(calibrated, CalibratedModel)
assert_type(calibrated.recipe, Recipe)
assert_type(export("model", "bundle", calibrated.recipe, cache=CacheOptions(), progress=follow), Manifest)
assert_type(check("bundle", "model", EvaluationText(corpus=corpus), progress=follow), Check)
assert_type(build("bundle", "engine.plan", BuildOptions(targets=("SM86",)), progress=follow), ProvidedEngine)
assert_type(inspect("engine.plan"), EngineInspection | BundleInspection | RunInspection)
assert_type(run_job(Job("model", Path("run"), plan=Path("engine.plan"))), JobResult)
with Engine.open("bundle") as engine:
    assert_type(engine, Engine)
try:
    export("model")  # type: ignore[call-arg]
except SpikeExportError as error:
    print(error)
