"""An engine is kept while nothing it follows from has changed; else it is built again, and the change is told."""

import errno
import importlib.util
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.artifacts.files.atomic_write import temporary_path
from spike_export.engines.build import builder as plan_builder
from spike_export.engines.build.builder import BuildEnvironment, BuildResult, build_engine, plan_build
from spike_export.engines.build.request import CompletionEvent
from spike_export.engines.build.reuse import ProvidedEngine, provide_engine
from spike_export.engines.plan.backend import TENSORRT_RTX, Gpu, Machine
from spike_export.engines.plan.build_options import SPLIT_PROFILES, BatchRange, BuildOptions
from spike_export.engines.plan.bundle_identity import hash_bundle
from spike_export.engines.plan.paths import artifact_paths, find_plans
from spike_export.engines.plan.sidecar import (
    AuditedModule,
    PlanKey,
    PlanSidecar,
    load_sidecar,
    sidecar_path,
    sidecar_text,
)
from tests.support.built_plans import build_plan
from tests.support.tiny.bundles import TinyModel, write_bundle

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
NO_BUILD = replace(CPU, command=("false",))
"""An environment in which a build cannot succeed: what comes of it was not built."""

SMALL = BuildOptions(targets=("SM86",), profiles=("decode",), max_context=64)
SPLIT = replace(SMALL, profiles=("prefill", "decode"), split=True)

KEY = PlanKey(
    tool="0.1.0",
    bundle="aa",
    backend="tensorrt-rtx",
    version="1.7.1.116",
    targets=("SM86",),
    device=None,
    profiles=("prefill", "decode"),
    split=False,
    batch=(1, 1, 1),
    context=64,
    typical_prompt=16,
    max_prompt=64,
    capacity=None,
    optimization_level=3,
    refit=False,
    strip_weights=False,
    weight_streaming=False,
    hardware_compatible=None,
    version_compatible=False,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ()),
        ({"optimization_level": 5, "bundle": "bb"}, ("bundle changed", "optimization level 3 -> 5")),
        ({"tool": "0.2.0"}, ("spike-export 0.1.0 -> 0.2.0",)),
        ({"version": "1.8.0.1"}, ("backend version 1.7.1.116 -> 1.8.0.1",)),
        ({"targets": ("SM80", "SM86")}, ("targets SM86 -> SM80+SM86",)),
        ({"device": "NVIDIA H200"}, ("device none -> NVIDIA H200",)),
        ({"split": True}, ("a plan per profile no -> yes",)),
        ({"batch": (1, 1, 8)}, ("batch 1+1+1 -> 1+1+8",)),
        ({"context": 128}, ("max context 64 -> 128",)),
        ({"weight_streaming": True}, ("weight streaming no -> yes",)),
        ({"hardware_compatible": "ampere-plus"}, ("hardware compatible none -> ampere-plus",)),
    ],
)
def test_what_changed_is_told_in_words(changes: Mapping[str, Any], words: tuple[str, ...]) -> None:
    assert KEY.model_copy(update=dict(changes)).changes_since(KEY) == words


def test_every_part_of_a_key_counts() -> None:
    for name, value in KEY:
        other = not value if isinstance(value, bool) else "x" if value is None or isinstance(value, str) else ()
        assert len(KEY.model_copy(update={name: other}).changes_since(KEY)) == 1, name


def test_every_option_of_a_build_is_part_of_its_key(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    key = plan_build(bundle, tmp_path / "e.plan", BuildOptions(), CPU).key("aa")
    changes: Mapping[str, Any] = {
        "targets": ("SM86",),
        "profiles": ("decode",),
        "split": True,
        "batch": BatchRange(1, 2, 2),
        "max_context": 64,
        "typical_prompt": 8,
        "max_prompt": 32,
        "optimization_level": 1,
        "weight_streaming": True,
    }
    for name, value in changes.items():
        options = replace(BuildOptions(), **{name: value})
        assert plan_build(bundle, tmp_path / "e.plan", options, CPU).key("aa") != key, name
    level = BuildOptions(optimization_level=3)
    assert plan_build(bundle, tmp_path / "e.plan", level, CPU).key("aa") == key


QUICK = """
import hashlib, json, sys
request, event = json.loads(sys.stdin.readline()), json.loads(sys.argv[1])
plan = json.dumps(request, sort_keys=True).encode()
open(request["plan"], "wb").write(plan)
event["profiles"] = [{"name": name, "inputs": {}} for name in request["profiles"]]
event["plan_sha256"], event["plan_size"] = hashlib.sha256(plan).hexdigest(), len(plan)
print(json.dumps(event))
"""
"""A build process that writes down what it was asked for, and tells of it what a real one told of its plan."""


@dataclass(frozen=True)
class Place:
    """A bundle, and an engine of it that was built; what else is built is built by `QUICK`."""

    bundle: Path
    engine: Path
    built: BuildResult
    quick: BuildEnvironment

    def again(
        self, options: BuildOptions, environment: BuildEnvironment | None = None, **switches: bool
    ) -> ProvidedEngine:
        environment = environment or self.quick
        return provide_engine(self.bundle, self.engine, options, environment=environment, **switches)

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.engine.parent.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    folder = tmp_path_factory.mktemp("engine")
    return build_plan(write_bundle(folder / "bundle"), folder / "engine.plan", SMALL, environment=CPU)


@pytest.fixture
def place(template: BuildResult, tmp_path: Path) -> Place:
    shutil.copytree(template.plan.parent, tmp_path, dirs_exist_ok=True)
    version = template.sidecar.backend.version
    told = CompletionEvent(
        version=version,
        profiles=(),
        plan_sha256="",
        plan_size=0,
        seconds=1.0,
        peak_memory=1,
        warnings=("odd",),
        audit=template.audit,
    )
    quick = replace(CPU, command=(sys.executable, "-I", "-c", QUICK, told.model_dump_json()))
    return Place(tmp_path / "bundle", tmp_path / "engine.plan", template, quick)


@needs_rtx
def test_the_same_engine_is_not_built_twice(place: Place) -> None:
    before = place.engine.read_bytes()
    again = place.again(SMALL, NO_BUILD)
    assert again.reused
    assert again.note == "kept: nothing it was built from has changed"
    assert (again.plans, again.sidecars) == ((place.engine,), (place.built.sidecar,))
    assert place.engine.read_bytes() == before


@needs_rtx
def test_where_nothing_was_it_is_built(place: Place, tmp_path: Path) -> None:
    first = provide_engine(place.bundle, tmp_path / "new" / "e.plan", SMALL, environment=place.quick)
    assert (first.note, first.reused, first.warnings) == ("built", False, ("odd",))
    assert provide_engine(place.bundle, tmp_path / "new" / "e.plan", SMALL, environment=NO_BUILD).reused


@needs_rtx
def test_a_change_is_told_and_built(place: Place) -> None:
    write_bundle(place.bundle, TinyModel(seed=3))
    again = place.again(replace(SMALL, optimization_level=5))
    assert again.note == "built again: bundle changed; optimization level 3 -> 5"
    assert again.sidecars[0].bundle_sha256 == hash_bundle(place.bundle)
    assert load_sidecar(place.engine) == again.sidecars[0]
    assert place.again(replace(SMALL, optimization_level=5), NO_BUILD).reused


@needs_rtx
def test_another_backend_version_makes_another_engine(place: Place) -> None:
    machine = replace(CPU.machine, versions={"tensorrt-rtx": "1.8.0.1"})
    with pytest.raises(EngineError, match="exit code 1"):  # it is built, and this environment cannot
        place.again(SMALL, replace(NO_BUILD, machine=machine))
    key = plan_build(place.bundle, place.engine, SMALL, replace(CPU, machine=machine)).key(hash_bundle(place.bundle))
    old = place.built.sidecar.key
    assert old is not None
    assert key.changes_since(old) == (f"backend version {old.version} -> 1.8.0.1",)


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1]), "belongs to a plan of"),
        (lambda plan: plan.write_bytes(plan.read_bytes()[:-1] + b"\1"), "is not the file that was built"),
    ],
    ids=["truncated", "other bytes"],
)
def test_a_damaged_engine_is_built_again(place: Place, damage: Any, told: str) -> None:
    damage(place.engine)
    again = place.again(SMALL)
    assert again.note.startswith("built again: ")
    assert told in again.note
    assert place.again(SMALL, NO_BUILD).reused


@needs_rtx
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text('{"notes": 1}')])
def test_a_plan_without_its_sidecar_is_not_ours(place: Place, damage: Any) -> None:
    damage(sidecar_path(place.engine))
    before = place.files
    for force in (False, True):
        with pytest.raises(ArtifactError, match=r"exists and is not .* that spike-export wrote; .* --overwrite"):
            place.again(SMALL, NO_BUILD, force=force)
    assert place.files == before
    again = place.again(SMALL, overwrite=True)
    assert again.note.startswith("built again: ")


@needs_rtx
def test_a_build_that_was_killed_before_its_last_step_is_whole(place: Place) -> None:
    sidecar = sidecar_path(place.engine)
    sidecar.rename(temporary_path(sidecar))
    assert place.again(SMALL, NO_BUILD).reused
    assert sidecar.is_file()


@needs_rtx
def test_a_sidecar_left_of_another_plan_is_not_put_into_place(place: Place) -> None:
    sidecar = sidecar_path(place.engine)
    sidecar.rename(temporary_path(sidecar))
    place.engine.write_bytes(place.engine.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtifactError, match="is not a plan that spike-export wrote"):
        place.again(SMALL, NO_BUILD)


@needs_rtx
def test_force_builds_in_any_case(place: Place) -> None:
    with pytest.raises(EngineError, match="exit code 1"):
        place.again(SMALL, NO_BUILD, force=True)
    assert place.again(SMALL, force=True).note == "built again: as asked for"


@needs_rtx
def test_a_split_engine_is_two_plans_and_replaces_the_one(place: Place) -> None:
    again = place.again(SPLIT, CPU)
    assert again.note == "built again: profiles decode -> prefill+decode; a plan per profile no -> yes"
    names = {"engine.prefill.plan", "engine.prefill.json", "engine.decode.plan", "engine.decode.json"}
    assert place.files.keys() == names
    assert {path.name for path in artifact_paths(place.engine, split=True)} == names
    assert find_plans(place.engine) == again.plans
    first, second = again.sidecars
    assert first.key == second.key
    assert again.warnings == ()
    assert [[p.name for p in sidecar.profiles] for sidecar in again.sidecars] == [["prefill"], ["decode"]]
    # The audit covers both: each plan proves all modules, in its one profile.
    for sidecar in again.sidecars:
        assert sidecar.audit.readable
        assert set(sidecar.audit.modules) == {*TinyModel().modules, "lm_head"}
    assert again.deviations == ()
    assert place.again(SPLIT, NO_BUILD).reused
    back = place.again(SMALL)
    assert place.files.keys() == {"engine.plan", "engine.json"}
    assert "a plan per profile yes -> no" in back.note


@needs_rtx
def test_an_engine_without_an_ending_has_sidecars_of_its_own_in_both_forms(place: Place, tmp_path: Path) -> None:
    engine = tmp_path / "new" / "plain"
    for options, names in (
        (SMALL, {"plain", "plain.json"}),
        (SPLIT, {"plain.prefill.plan", "plain.prefill.json", "plain.decode.plan", "plain.decode.json"}),
    ):
        provide_engine(place.bundle, engine, options, environment=place.quick)
        assert {path.name for path in engine.parent.iterdir()} == names
        assert provide_engine(place.bundle, engine, options, environment=NO_BUILD).reused
    provide_engine(place.bundle, engine, SMALL, environment=place.quick)
    assert {path.name for path in engine.parent.iterdir()} == {"plain", "plain.json"}


@needs_rtx
def test_plans_that_merely_have_the_names_of_halves_are_kept(place: Place, tmp_path: Path) -> None:
    engine = tmp_path / "new" / "e.plan"
    for name in SPLIT_PROFILES:
        options = replace(SMALL, profiles=(name,))
        provide_engine(place.bundle, engine.with_name(f"e.{name}.plan"), options, environment=place.quick)
    before = {path: path.read_bytes() for path in engine.parent.iterdir()}
    assert provide_engine(place.bundle, engine, SMALL, environment=place.quick).note == "built"
    assert provide_engine(place.bundle, engine, SMALL, environment=NO_BUILD).reused
    assert {path: path.read_bytes() for path in before} == before


@needs_rtx
def test_what_is_left_of_an_interrupted_change_of_form_is_removed_or_built_again(place: Place) -> None:
    single = {path: path.read_bytes() for path in (place.engine, sidecar_path(place.engine))}
    place.again(SPLIT)
    for path, content in single.items():  # as if the process had died before the old form was removed
        path.write_bytes(content)
    assert place.again(SPLIT, NO_BUILD).reused
    assert not any(path.exists() for path in single)
    (place.engine.parent / "engine.prefill.plan").unlink()
    assert place.again(SPLIT).note.endswith("engine.decode.plan is missing")


@needs_rtx
def test_a_module_that_deviates_in_both_halves_is_named_once(place: Place) -> None:
    provided = place.again(SPLIT)
    wrong = AuditedModule(planned="int8", found=("float16",), as_planned=False)
    sidecars = tuple(
        sidecar.model_copy(update={"audit": sidecar.audit.model_copy(update={"modules": {"m": wrong}})})
        for sidecar in provided.sidecars
    )
    assert provided.deviations == ()
    assert replace(provided, sidecars=sidecars).deviations == ("m",)


@needs_rtx
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_ctrl_c_during_either_half_keeps_the_engine_that_was_there(place: Place, half: str) -> None:
    before = place.files

    def interrupt(what: str, done: int, total: int) -> None:
        if half in what:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        provide_engine(place.bundle, place.engine, SPLIT, interrupt, CPU)
    assert place.files == before


@needs_rtx
@pytest.mark.parametrize("options", [SMALL, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"])
def test_no_plan_appears_without_its_sidecar(
    place: Place, monkeypatch: pytest.MonkeyPatch, options: BuildOptions, failure: BaseException
) -> None:
    before = place.files
    written: list[PlanSidecar] = []

    def fail(sidecar: PlanSidecar) -> str:
        written.append(sidecar)
        if len(written) == len(options.plan_profiles):
            raise failure
        return sidecar_text(sidecar)

    monkeypatch.setattr(plan_builder, "sidecar_text", fail)
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        place.again(options, force=True)
    assert len(written) == len(options.plan_profiles)
    assert place.files == before


def test_a_split_engine_needs_the_memory_of_one_profile(tmp_path: Path) -> None:
    bundle, gib = write_bundle(tmp_path / "bundle"), 1 << 30
    tight = replace(NO_BUILD, available=5 * gib)
    build = replace(plan_build(bundle, tmp_path / "e.plan", SPLIT, tight), weight_bytes=gib)
    with pytest.raises(EngineError, match="exit code 1"):  # the build was begun
        build_engine(build, "aa", lambda *step: None, tight)
    both = replace(build, options=replace(SPLIT, split=False))
    with pytest.raises(EngineError, match=r"needs about 6\.5 GiB .* 5\.0 GiB are available; build the profiles one by"):
        build_engine(both, "aa", lambda *step: None, tight)


def test_a_foreign_file_in_the_place_of_a_split_engine_is_refused(tmp_path: Path) -> None:
    bundle, engine = write_bundle(tmp_path / "bundle"), tmp_path / "engine.plan"
    engine.write_bytes(b"mine")
    with pytest.raises(EngineError, match=r"was not built here; a split engine is engine\.prefill\.plan and"):
        provide_engine(bundle, engine, SPLIT, environment=NO_BUILD)
    assert engine.read_bytes() == b"mine"


@needs_rtx
def test_the_halves_have_their_profiles_in_whatever_order_they_are_asked_for(place: Place) -> None:
    provided = place.again(replace(SPLIT, profiles=("decode", "prefill")))
    assert [path.name for path in provided.plans] == ["engine.prefill.plan", "engine.decode.plan"]
    assert [sidecar.profiles[0].name for sidecar in provided.sidecars] == ["prefill", "decode"]
    assert place.again(SPLIT, NO_BUILD).reused


def test_a_bundle_without_weights_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle / "model.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"model\.onnx\.data: .* is not a complete bundle, export it again"):
        provide_engine(bundle, tmp_path / "engine.plan", SPLIT, environment=NO_BUILD)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_unwritable_timing_cache_is_found_out_before_the_build(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    machine = Machine(frozenset({"tensorrt"}), Gpu("H200", "SM90"), versions={"tensorrt": "11.4.0"})
    options = BuildOptions(timing_cache=Path("/proc/none/timing.cache"))
    with pytest.raises(ArtifactError, match=r"/proc/none/\S+: cannot write"):
        provide_engine(bundle, tmp_path / "e.plan", options, environment=replace(NO_BUILD, machine=machine))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(ArtifactError, match="cannot write"):
        provide_engine(bundle, Path("/proc/none/engine.plan"), SPLIT, environment=NO_BUILD)
