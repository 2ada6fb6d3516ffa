"""Plans built by the real compiler, on the CPU, of a graph of a few kilobytes."""

import hashlib
import importlib.util
import json
import signal
from pathlib import Path

import onnx
import pytest

from spike_export.artifacts.errors import ArtifactError, EngineError
from spike_export.engines.build.builder import BuildEnvironment, BuildResult, plan_build
from spike_export.engines.build.child_process import run_build
from spike_export.engines.build.process import peak_memory
from spike_export.engines.build.request import BuildRequest
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.bundle_identity import HASHED_FILES, hash_bundle
from spike_export.engines.plan.sidecar import load_sidecar, sidecar_path
from tests.support.built_plans import build_plan
from tests.support.tiny.bundles import MAX_POSITIONS, TinyModel, tiny_graph, write_bundle

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
SM86 = BuildOptions(targets=("SM86",))
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"), TinyModel(kept=(f"{LAYER}.mlp.down_proj",)))


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def result(bundle: Path, steps: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    plan = tmp_path_factory.mktemp("plan") / "engine.plan"
    return build_plan(bundle, plan, SM86, lambda *step: steps.append(step), CPU)


def test_the_sidecar_identifies_plan_bundle_and_compiler(result: BuildResult, bundle: Path) -> None:
    sidecar = load_sidecar(result.plan)
    assert sidecar == result.sidecar
    data = result.plan.read_bytes()
    assert (sidecar.plan.size, sidecar.plan.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    joined = b"".join((bundle / name).read_bytes() for name in HASHED_FILES)
    assert sidecar.bundle_sha256 == hash_bundle(bundle) == hashlib.sha256(joined).hexdigest()
    assert sidecar.backend.name == "tensorrt-rtx"
    assert sidecar.backend.version[0].isdigit()
    assert "CPU" in sidecar.backend.reason
    assert sidecar.targets == ("SM86",)
    assert (sidecar.prefix, sidecar.max_context) == (3, MAX_POSITIONS)
    assert 0 < sidecar.build_seconds < 600
    assert 50 << 20 < sidecar.peak_memory < 4 << 30


def test_the_sidecar_lists_the_profiles_in_the_plan_s_order(result: BuildResult) -> None:
    prefill, decode = result.sidecar.profiles
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.inputs["past_key_values.0.key"].min == (1, 2, 0, 64)
    assert decode.inputs["input_ids"].max == (1, 1)
    assert '"min": [ 1, 2, 0, 64 ]' in sidecar_path(result.plan).read_text(encoding="utf-8")


def test_the_audit_finds_every_module_as_planned(result: BuildResult) -> None:
    modules = result.sidecar.audit.modules
    expected = TinyModel(kept=(f"{LAYER}.mlp.down_proj",)).planned | {"lm_head": "float16"}
    assert {name: module.planned for name, module in modules.items()} == expected
    assert all(module.found == (module.planned,) for module in modules.values())
    assert result.deviations == ()
    # q+k+v, o, gate+up in each of two profiles; down_proj and lm_head stay in 16 bit.
    assert (result.audit.int8_products, result.audit.other_products) == (6, 4)


def test_progress_rises_and_is_complete(result: BuildResult, steps: list[tuple[str, int, int]]) -> None:
    for what in dict.fromkeys(step[0] for step in steps):
        done = [step[1] for step in steps if step[0] == what]
        assert done == sorted(done)
        assert done[-1] == next(step[2] for step in steps if step[0] == what)
    assert len({done for what, done, _ in steps if "built" in what}) > 10


def test_nothing_but_plan_and_sidecar_is_left(result: BuildResult) -> None:
    assert {path.name for path in result.plan.parent.iterdir()} == {"engine.plan", "engine.json"}


def test_the_shipped_graph_is_not_changed(bundle: Path, result: BuildResult) -> None:
    graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False).graph
    assert "TRT_decomposable" not in {a.name for node in graph.node for a in node.attribute}


def test_a_float32_bundle_builds_though_no_fused_attention_exists(tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "bundle", TinyModel(dtype="float32"))
    built = build_plan(source, tmp_path / "e.plan", BuildOptions(targets=("SM86",)), environment=CPU)
    assert built.audit.readable
    assert built.deviations == ()
    assert built.sidecar.audit.modules["lm_head"].found == ("float32",)


@pytest.mark.parametrize(
    ("ropes", "found"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "dynamic", "rope_theta": 1e4}, "dynamic"),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, "longrope"),
    ],
)
def test_a_rope_that_depends_on_the_length_is_known_to_the_build(
    tmp_path: Path, ropes: dict[str, object], found: str | None
) -> None:
    source = write_bundle(tmp_path / "bundle", TinyModel())
    assert plan_build(source, tmp_path / "e.plan", SM86, CPU).rope is None
    (source / "config.json").write_text(json.dumps({"rope_parameters": ropes}))
    assert plan_build(source, tmp_path / "e.plan", SM86, CPU).rope == found
    (source / "config.json").write_text("{}")
    with pytest.raises(EngineError, match=r"config\.json: cannot read the model's rope"):
        plan_build(source, tmp_path / "e.plan", SM86, CPU)


def test_a_single_profile_and_several_targets(bundle: Path, tmp_path: Path) -> None:
    options = BuildOptions(targets=("SM80", "SM120"), profiles=("decode",), max_context=64)
    built = build_plan(bundle, tmp_path / "e.plan", options, environment=CPU)
    assert built.audit.targets == ("SM80", "SM120")
    assert [profile.name for profile in built.sidecar.profiles] == ["decode"]
    assert built.deviations == ()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signal_at", [0, 40, 80])
def test_ctrl_c_leaves_nothing_and_keeps_the_previous_plan(bundle: Path, tmp_path: Path, signal_at: int) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"previous")

    def interrupt(what: str, done: int, total: int) -> None:
        if "built" in what and done >= signal_at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_plan(bundle, plan, SM86, interrupt, CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.plan"]
    assert plan.read_bytes() == b"previous"


def test_a_truncated_data_file_is_named(tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "bundle")
    data = source / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(EngineError, match=r"model\.onnx\.data is truncated: \S+ ends at byte \d+ and the file at"):
        build_plan(source, tmp_path / "engine.plan", SM86, environment=CPU)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", HASHED_FILES)
def test_a_missing_file_of_the_bundle_is_named(tmp_path: Path, name: str) -> None:
    source = write_bundle(tmp_path / "bundle")
    (source / name).unlink()
    with pytest.raises((EngineError, ArtifactError), match=name):
        build_plan(source, tmp_path / "engine.plan", SM86, environment=CPU)


def test_a_file_that_is_no_onnx_model_is_refused(tmp_path: Path) -> None:
    source = write_bundle(tmp_path / "bundle")
    (source / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(EngineError, match=r"model\.onnx: not a readable ONNX model"):
        build_plan(source, tmp_path / "engine.plan", SM86, environment=CPU)


def test_a_refused_node_is_named_with_operator_and_reason(tmp_path: Path) -> None:
    graph = tiny_graph(TinyModel())
    zero_point = next(t for t in graph.graph.initializer if t.name == f"{LAYER}.mlp.up_proj.input_zero_point")
    zero_point.raw_data = b"\x05"  # TensorRT takes symmetric quantization only
    source = write_bundle(tmp_path / "bundle", proto=graph)
    with pytest.raises(EngineError) as caught:
        build_plan(source, tmp_path / "engine.plan", SM86, environment=CPU)
    message = str(caught.value)
    assert f"'{LAYER}.mlp.up_proj.Quantize' (QuantizeLinear)" in message
    assert "zero" in message


def test_an_unwritable_place_is_found_out_before_the_build(bundle: Path) -> None:
    asked: list[object] = []
    with pytest.raises(ArtifactError, match="cannot write"):
        build_plan(bundle, Path("/proc/none/engine.plan"), SM86, lambda *step: asked.append(step), CPU)
    assert asked == []


def test_a_full_disk_during_the_build_is_an_os_error(bundle: Path) -> None:
    request = BuildRequest(
        backend="tensorrt-rtx",
        graph=str(bundle / "model.onnx"),
        plan="/dev/full",
        targets=("SM86",),
        profiles=("decode",),
        batch=(1, 1, 1),
        context=64,
        typical_prompt=64,
        max_prompt=64,
        prefix=3,
        optimization_level=3,
    )
    with pytest.raises(OSError, match="No space left"):
        run_build(request, lambda *step: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(targets=("SM90",)), "cannot target SM90"),
        (BuildOptions(backend="tensorrt"), "tensorrt is not installed"),
        (BuildOptions(max_context=MAX_POSITIONS + 1), "the model takes"),
        (BuildOptions(timing_cache=Path("t")), "keeps no timing cache"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_read(
    bundle: Path, tmp_path: Path, options: BuildOptions, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build_plan(bundle, tmp_path / "engine.plan", options, environment=CPU)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_unless_overridden(bundle: Path, tmp_path: Path) -> None:
    poor = BuildEnvironment(CPU.machine, available=1 << 20)
    with pytest.raises(EngineError, match="GiB are available"):
        build_plan(bundle, tmp_path / "engine.plan", SM86, environment=poor)
    options = BuildOptions(targets=("SM86",), profiles=("decode",), ignore_memory=True)
    assert build_plan(bundle, tmp_path / "engine.plan", options, environment=poor).plan.is_file()


def test_the_plan_may_not_take_its_sidecar_s_name(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="choose another ending"):
        build_plan(bundle, tmp_path / "engine.json", SM86, environment=CPU)


def test_a_sidecar_of_another_plan_is_refused(result: BuildResult, tmp_path: Path) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"other")
    sidecar_path(plan).write_text(sidecar_path(result.plan).read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="belongs to a plan of"):
        load_sidecar(plan)
    sidecar_path(plan).write_text(json.dumps({"format": 1}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="Field required"):
        load_sidecar(plan)


def test_peak_memory_is_this_process_s_own() -> None:
    assert 10 << 20 < peak_memory() < 64 << 30
    assert peak_memory(Path("/nonexistent")) == 0
