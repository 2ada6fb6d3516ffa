"""Plans that must not be loaded are recognised by their first bytes, sidecar and hash; nothing of them runs."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.progress import Progress, silent
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.build.rebuild import usable_or_rebuilt_engine
from spike_export.engines.build.reuse import provide_engine
from spike_export.engines.plan.backend import TENSORRT, TENSORRT_RTX, Gpu, Machine
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.header import HEADER_SIZE, read_header
from spike_export.engines.plan.safety import StalePlanError, usable_engine
from spike_export.engines.plan.sidecar import PlanSidecar, load_sidecar, sidecar_path, sidecar_text
from spike_export.engines.plan.validity import require_valid_header
from tests.support.built_plans import build_plan
from tests.support.tiny.bundles import TinyModel, write_bundle

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

RTX3090 = Gpu("NVIDIA GeForce RTX 3090", "SM86")
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", "SM89")
HERE = Machine(frozenset({"tensorrt-rtx"}), RTX3090)
SMALL = BuildOptions(targets=("SM86",), profiles=("decode",), max_context=64)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundle`, `engine.plan` and a split engine `two`."""
    folder = tmp_path_factory.mktemp("built")
    bundle = write_bundle(folder / "bundle")
    environment = BuildEnvironment(HERE, None)
    build_plan(bundle, folder / "engine.plan", SMALL, environment=environment)
    split = replace(SMALL, profiles=("prefill", "decode"), split=True)
    provide_engine(bundle, folder / "two.plan", split, environment=environment)
    return folder


@pytest.fixture
def plan(built: Path, tmp_path: Path) -> Path:
    for name in ("engine.plan", "engine.json"):
        shutil.copy(built / name, tmp_path)
    shutil.copytree(built / "bundle", tmp_path / "bundle")
    return tmp_path / "engine.plan"


def usable(plan: Path, bundle: Path | None = None, machine: Machine = HERE, progress: Progress = silent) -> PlanSidecar:
    """Return the sidecar of an engine of one plan that may be loaded."""
    (checked,) = usable_engine(plan, bundle, machine, progress)
    assert checked.path == plan
    return checked.sidecar


def describe(path: Path, **changes: Any) -> None:
    """Change fields of a plan's sidecar; those of its key as `key={...}`."""
    sidecar = load_sidecar(path)
    assert sidecar.key is not None
    changes["key"] = sidecar.key.model_copy(update=changes.get("key", {}))
    sidecar_path(path).write_text(sidecar_text(sidecar.model_copy(update=changes)), encoding="utf-8")


def test_what_was_built_here_may_be_loaded(plan: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    sidecar = usable(plan, plan.parent / "bundle", HERE, lambda *step: steps.append(step))
    assert sidecar == load_sidecar(plan)
    assert [step[0] for step in steps] == ["bytes of the bundle hashed"] * 3 + ["bytes of the plan hashed"]
    assert usable(plan) == sidecar


def test_the_header_tells_compiler_version_size_and_targets(built: Path, tmp_path: Path) -> None:
    header = read_header(built / "engine.plan")
    sidecar = load_sidecar(built / "engine.plan")
    assert header.backend is TENSORRT_RTX
    assert header.version == sidecar.backend.version
    assert header.size == sidecar.plan.size == (built / "engine.plan").stat().st_size
    assert header.targets == ("SM86",)
    several = replace(SMALL, targets=("SM80", "SM89", "SM120", "SM121"))
    more = build_plan(built / "bundle", tmp_path / "e.plan", several, environment=BuildEnvironment(HERE, None)).plan
    assert read_header(more).targets == several.targets


def test_a_header_of_tensorrt_is_read_as_its_own_tool_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "e.plan"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([11, 4, 0, 106]) + bytes(1000))
    header = read_header(path)
    assert (header.backend, header.version, header.size, header.targets) == (TENSORRT, "11.4.0.106", None, ())
    assert header.title == "TensorRT 11.4.0.106"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a TensorRT or TensorRT-RTX plan .it is empty"),
        (b"GGUF\3\0\0\0" + bytes(100), "it begins with 47 47 55 46"),
        (b"vtrt", "it begins with 76 74 72 74"),
        (b"ftrt\1\0\0\0" + bytes(100), "not a TensorRT or TensorRT-RTX plan"),  # a serialization that is not known
        (b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]) + bytes(100), r"foreign plan of TensorRT-RTX 1\.7\.1\.116"),
        (b"ftrt" + bytes(20) + bytes([10, 3, 0, 26]) + bytes(100), r"foreign plan of TensorRT 10\.3\.0\.26"),
    ],
)
def test_what_is_no_plan_of_ours_is_refused_and_not_stale(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=message) as caught:
        usable_engine(path, None, HERE)
    assert not isinstance(caught.value, StalePlanError)


def test_a_plan_without_its_sidecar_is_foreign(plan: Path) -> None:
    sidecar_path(plan).unlink()
    with pytest.raises(EngineError, match=r"engine\.json is missing\. Plans are code"):
        usable(plan)


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"engine\.plan: no such plan, and none of its halves engine\.prefill\.plan"):
        usable_engine(tmp_path / "engine.plan", None, HERE)
    with pytest.raises(EngineError, match="cannot read the plan: No such file"):
        read_header(tmp_path / "engine.plan")


def truncate(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])


def flip(plan: Path, place: int) -> None:
    data = bytearray(plan.read_bytes())
    data[place] ^= 1
    plan.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"belongs to a plan of \d+ bytes, but \S+engine.plan has \d+; build the plan again"),
        (lambda plan: flip(plan, -1), "not the file that was built: its bytes have changed"),
        (lambda plan: flip(plan, HEADER_SIZE), "not the file that was built: its bytes have changed"),
        (
            lambda plan: flip(plan, 25),
            r"a plan of TensorRT-RTX 1\.6\.1\.116 for SM86, and its sidecar describes one of",
        ),
        (lambda plan: flip(plan, 16), r"has \d+ bytes by its header and \d+ bytes by its sidecar"),
        (lambda plan: flip(plan, 3), "not a TensorRT or TensorRT-RTX plan"),
        (lambda plan: sidecar_path(plan).write_text("{}"), "Field required; build the plan again"),
    ],
    ids=["truncated", "last byte", "first byte of the body", "version", "size", "tag", "sidecar"],
)
def test_damage_is_told_apart(plan: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(plan)
    with pytest.raises(EngineError, match=message):
        usable(plan)


def test_a_changed_bundle_is_recognised(plan: Path) -> None:
    with (plan.parent / "bundle" / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(StalePlanError, match=r"not built from the bundle that is now in \S+bundle"):
        usable(plan, plan.parent / "bundle", HERE)
    assert usable(plan)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (replace(HERE, versions={"tensorrt-rtx": "1.8.0.2"}), r"TensorRT-RTX 1\.7\.\S+ and runs .* here is 1\.8\.0\.2"),
        (replace(HERE, installed=frozenset()), "needs TensorRT-RTX .* which is not installed; run: pip install"),
        (replace(HERE, gpu=RTX4090), r"built for SM86, and the GPU here is NVIDIA GeForce RTX 4090 \(SM89\)"),
    ],
)
def test_another_version_or_gpu_makes_a_plan_stale(plan: Path, machine: Machine, message: str) -> None:
    with pytest.raises(StalePlanError, match=message):
        usable(plan, None, machine)


def test_without_a_gpu_no_plan_runs(plan: Path) -> None:
    with pytest.raises(EngineError, match="needs an NVIDIA GPU, and there is none here"):
        usable(plan, None, replace(HERE, gpu=None))


def test_a_plan_without_its_weights_needs_its_bundle(plan: Path) -> None:
    describe(plan, key={"strip_weights": True})
    with pytest.raises(EngineError, match="was built without its weights; give the bundle"):
        usable(plan)
    assert usable(plan, plan.parent / "bundle", HERE)


A100, A30 = Gpu("NVIDIA A100", "SM80"), Gpu("NVIDIA A30", "SM80")
H200 = Gpu("NVIDIA H200", "SM90")


@pytest.mark.parametrize(
    ("key", "version", "gpu", "message"),
    [
        ({}, "11.4.0.106", A100, None),
        ({}, "11.4.0.106", A30, "built for the NVIDIA A100, and the GPU here is NVIDIA A30"),
        ({}, "11.4.0.106", H200, "built for SM80, and the GPU here is NVIDIA H200"),
        ({}, "11.5.0.2", A100, "runs in that version only; here is"),
        ({"hardware_compatible": "same-compute-capability"}, "11.4.0.106", A30, None),
        ({"hardware_compatible": "same-compute-capability"}, "11.4.0.106", H200, "built for SM80"),
        ({"hardware_compatible": "ampere-plus"}, "11.4.0.106", H200, None),
        ({"hardware_compatible": "ampere-plus"}, "11.4.0.106", Gpu("Tesla T4", "SM75"), "built for SM80"),
        ({"version_compatible": True}, "11.5.0.2", A100, None),
        ({"version_compatible": True}, "12.0.0.1", A100, None),
        ({"version_compatible": True}, "11.3.0.9", A100, "or a later one; here is 11.3.0.9"),
    ],
)
def test_a_plan_of_tensorrt_runs_where_it_was_built_to_run(
    plan: Path, key: dict[str, object], version: str, gpu: Gpu, message: str | None
) -> None:
    """Its bytes are made up: only TensorRT itself could tell the body from a real one."""
    data = bytearray(plan.read_bytes())
    data[:4], data[24:28] = b"ftrt", bytes([11, 4, 0, 106])
    plan.write_bytes(bytes(data))
    sidecar = load_sidecar(plan)
    describe(
        plan,
        backend=sidecar.backend.model_copy(update={"name": "tensorrt", "version": "11.4.0.106"}),
        targets=("SM80",),
        plan=sidecar.plan.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()}),
        key={"backend": "tensorrt", "device": A100.name, **key},
    )
    machine = Machine(frozenset({"tensorrt"}), gpu, {"tensorrt": version})
    if message is None:
        assert usable(plan, None, machine).backend.name == "tensorrt"
    else:
        with pytest.raises(StalePlanError, match=message):
            usable(plan, None, machine)


def test_a_split_engine_is_two_plans_that_belong_together(built: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    prefill, decode = usable_engine(built / "two.plan", built / "bundle", HERE, lambda *step: steps.append(step[0]))
    assert len([step for step in steps if "bundle" in step]) == 3, "the bundle is hashed once for both"
    assert [plan.path.name for plan in (prefill, decode)] == ["two.prefill.plan", "two.decode.plan"]
    assert [[p.name for p in plan.sidecar.profiles] for plan in (prefill, decode)] == [["prefill"], ["decode"]]
    for path in built.glob("two.*"):
        shutil.copy(path, tmp_path)
    describe(tmp_path / "two.decode.plan", key={"tool": "0.0.1"})
    with pytest.raises(StalePlanError, match=r"two\.prefill\.plan and two\.decode\.plan are of different builds"):
        usable_engine(tmp_path / "two.plan", None, HERE)
    (tmp_path / "two.prefill.plan").unlink()
    with pytest.raises(EngineError, match=r"two\.prefill\.plan is missing, the other half of the engine is there"):
        usable_engine(tmp_path / "two.plan", None, HERE)


def test_a_stale_plan_is_built_again_as_it_was_built_before(plan: Path) -> None:
    bundle, environment = plan.parent / "bundle", BuildEnvironment(HERE, None)
    (untouched,) = usable_or_rebuilt_engine(plan, bundle, environment=environment)
    assert untouched.sidecar == load_sidecar(plan)
    write_bundle(bundle, TinyModel(seed=5))
    (rebuilt,) = usable_or_rebuilt_engine(plan, bundle, environment=environment)
    old, new = untouched.sidecar, rebuilt.sidecar
    assert old.key is not None
    assert new.key is not None
    assert new.key.changes_since(old.key) == ("bundle changed",)
    assert [profile.name for profile in new.profiles] == ["decode"]
    moved = replace(environment, machine=replace(HERE, gpu=RTX4090))
    (elsewhere,) = usable_or_rebuilt_engine(plan, bundle, environment=moved)
    assert elsewhere.sidecar.targets == ("SM89",)
    assert elsewhere.sidecar.max_context == 64


def test_a_rebuilt_plan_that_does_not_run_as_planned_is_told_before_it_runs(plan: Path) -> None:
    bundle, environment = plan.parent / "bundle", BuildEnvironment(HERE, None)
    wrong = "model.layers.0.mlp.up_proj"
    write_bundle(bundle, TinyModel(wrong_axis=(wrong,), hidden=128))
    with pytest.raises(EngineError, match=f"was built again, and {wrong} does not run in the planned precision; see"):
        usable_or_rebuilt_engine(plan, bundle, environment=environment)
    (again,) = usable_or_rebuilt_engine(plan, bundle, environment=environment)
    assert not again.sidecar.audit.modules[wrong].as_planned


def test_what_is_not_ours_is_not_overwritten(plan: Path) -> None:
    sidecar_path(plan).unlink()
    content = plan.read_bytes()
    with pytest.raises(EngineError, match="foreign plan"):
        usable_or_rebuilt_engine(plan, plan.parent / "bundle", environment=BuildEnvironment(HERE, None))
    assert plan.read_bytes() == content


def test_nothing_is_built_again_where_it_could_not_run(plan: Path) -> None:
    truncate(plan)
    nowhere = BuildEnvironment(replace(HERE, gpu=None), None, command=("false",))
    with pytest.raises(StalePlanError, match="belongs to a plan of"):
        usable_or_rebuilt_engine(plan, plan.parent / "bundle", environment=nowhere)


def test_the_runtime_itself_knows_a_malformed_header(plan: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    flip(plan, 0)
    with pytest.raises(EngineError, match=r"cannot run here, says TensorRT-RTX \S+: malformed engine"):
        require_valid_header(trt, runtime, plan)


class FakeRuntime:
    """Answers as `trt.Runtime` would on a GPU."""

    def __init__(self, validity: object, diagnostics: int = 0) -> None:
        self.answer = (validity, diagnostics)

    def get_engine_validity(self, header: bytes) -> tuple[object, int]:
        assert len(header) == HEADER_SIZE
        return self.answer


def test_the_runtime_s_answer_is_put_into_words(plan: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    validity, why = trt.EngineValidity, trt.EngineInvalidityDiagnostics
    memory = int(why.INSUFFICIENT_GPU_MEMORY)
    for runtime in (FakeRuntime(validity.VALID), FakeRuntime(validity.SUBOPTIMAL, memory), object()):
        require_valid_header(trt, runtime, plan)
    old = memory | int(why.OLD_CUDA_DRIVER)
    with pytest.raises(EngineError, match="old cuda driver, insufficient gpu memory"):
        require_valid_header(trt, FakeRuntime(validity.INVALID, old), plan)
    with pytest.raises(EngineError, match="no reason given; is the CUDA driver in order"):
        require_valid_header(trt, FakeRuntime(validity.INVALID), plan)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", b"vtrt", b"ftrt", b"vtrt" + bytes(4)]), st.binary(max_size=200))
def test_no_bytes_at_all_are_more_than_an_error(start: bytes, rest: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "engine.plan"
        path.write_bytes(start + rest)
        with pytest.raises(EngineError, match=r"not a TensorRT or TensorRT-RTX plan|is a foreign plan of"):
            usable_engine(path, None, HERE)


def test_a_sidecar_cut_anywhere_is_an_error_and_mends_by_building(plan: Path) -> None:
    text = sidecar_path(plan).read_text()
    for length in range(0, len(text) - 2, 37):
        sidecar_path(plan).write_text(text[:length])
        with pytest.raises(StalePlanError, match="build the plan again"):
            usable(plan)


def test_sidecars_of_older_versions_can_be_used(plan: Path) -> None:
    document = json.loads(sidecar_path(plan).read_text())
    del document["key"]
    sidecar_path(plan).write_text(json.dumps(document))
    assert usable(plan).key is None
