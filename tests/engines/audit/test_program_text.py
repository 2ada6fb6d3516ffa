"""The reader of program text: what it takes from a program, and that a change of its format does not pass."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.engines.audit import reader
from spike_export.engines.audit.program_products import read_program_text
from spike_export.engines.audit.program_text import CHECKED_VERSION, read_plan_text
from spike_export.engines.audit.reader import read_plan
from spike_export.engines.audit.reading import NARROW_SUMS, WEIGHT_ONLY, Evidence, PlanReading
from spike_export.engines.audit.verdict import NOT_FOUND, PlanAudit, covering, judge
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.plan.backend import TENSORRT_RTX, Gpu, Machine
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.bundle_identity import hash_plan
from spike_export.engines.plan.sidecar import Audit, BackendVersion, PlanFile, PlanSidecar, sidecar_path, sidecar_text
from tests.support.built_plans import audit_plan, build_plan
from tests.support.tiny.bundles import TinyModel, write_bundle

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
UP = "model.layers.0.mlp.up_proj"

PROGRAM = f"""header {{
  version = 5
  accelerators={{sm80 sm86 }}
}}
descriptors {{
  tensor={{ alignment=128 dims={{ 1 64 }} name="x" offset=0 region="devmem" type=int8 }}
  tensor={{ alignment=128 const_payload_size=4096 dims={{ 64 64 }} name="w" offset=1 region=consts type=int8 }}
  tensor={{ alignment=128 const_payload_size=4096 dims={{ 64 64 }} name="again" offset=1 region=consts type=int8 }}
  tensor={{ alignment=128 const_payload_size=256 dims={{ 64 }} name="scales" offset=2 region=consts type=float }}
  tensor={{ alignment=128 const_payload_size=8192 dims={{ 64 64 }} name="half" offset=3 region=consts type=half }}
  tensor={{ alignment=128 dims={{ 1 64 }} name="y" offset=4 region="devmem" type=float }}
  tensor={{ alignment=128 dims={{ 1 64 }} name="z" offset=4 region="devmem" type=half }}
}}
main {{
 label bb1:
  shape_call={{ name="__mye1" stream=0 layers="" subg_id=0 }}
  fully_connected={{ name="{Q}.MatMul_U1+{K}.MatMul" output={{"y" }} input={{"x" "w" "scales" }} layers="[ONNX Layer: {Q}.MatMul][ONNX Layer: {K}.MatMul]" }}
  novelty={{ name=__new stream=0 layers="[ONNX Layer: model.layers.0.self_attn.Attention]" }}
  function={{ name=__myl_MulSum fqn=__myl_0x1 args={{ "z" "half" "y" }} input_args={{ "z" "half" }} output_args={{ "y" }} layers="[ONNX Layer: {Q}.MatMul][ONNX Layer: {UP}.MatMul]" }}
}}
shape_main {{
  mul={{ name="__mye2" output={{"a" }} input={{"b" }} stream=0 layers="" }}
}}
"""  # noqa: E501  # lines as the compiler writes them

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)


def write_plan(path: Path, *programs: str, version: tuple[int, ...] = (*CHECKED_VERSION, 1, 116)) -> Path:
    header = b"vtrt" + bytes(20) + bytes(version) + bytes(36)
    path.write_bytes(header + b"\0".join(program.encode() for program in programs) + bytes(8))
    return path


def test_a_program_s_products_kernels_and_constants(tmp_path: Path) -> None:
    reading = read_program_text(write_plan(tmp_path / "e.plan", PROGRAM))
    (program,) = reading.programs
    assert (program.profile, program.targets) == (0, ("SM80", "SM86"))
    assert program.precisions == {Q: "int8", K: "int8", UP: "float16"}
    # What merely prepares shapes launches nothing; an operation of an unknown kind counts as a kernel.
    assert [(kernel.name, kernel.computes) for kernel in program.kernels] == [
        (f"{Q}.MatMul_U1+{K}.MatMul", (Q, K)),
        ("__new", ()),
        ("__myl_MulSum", (UP,)),
    ]
    # Constants of one place are stored once.
    assert program.weight_bytes == {"int8": 4096, "float32": 256, "float16": 8192}
    audit = audit_plan(tmp_path / "e.plan", {Q: "int8", K: "int8", UP: "float16"})
    assert audit.deviations == ()
    assert (audit.int8_products, audit.other_products) == (1, 1)
    assert audit.programs[0].unfused_attention == ("model.layers.0.self_attn.Attention",)
    assert audit.programs[0].fused == ((Q, K),)


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        (lambda text: text.replace('output={"y" } input={"x"', 'output={"z" } input={"x"'), NARROW_SUMS["int8"]),
        (lambda text: text.replace('input={"x" "w"', 'input={"z" "w"'), WEIGHT_ONLY),
        (lambda text: text.replace('input={"x" "w"', 'input={"z" "half"'), "float16"),
        (lambda text: text.replace('input={"x" "w"', 'input={"a" "b"'), "unknown"),
    ],
)
def test_a_product_s_operands_and_output_decide(tmp_path: Path, change: Callable[[str], str], precision: str) -> None:
    plan = write_plan(tmp_path / "e.plan", change(PROGRAM))
    assert {module.module: module.found for module in audit_plan(plan, {Q: "int8", K: "int8"}).deviations} == {
        Q: (precision,),
        K: (precision,),
    }


def test_what_holds_in_one_program_only_does_not_hold(tmp_path: Path) -> None:
    """Programs of two profiles, and of two targets of one profile."""
    second = PROGRAM.replace('name="x"', 'name="x [profile 1]"').replace('input={"x"', 'input={"z"')
    other_target = PROGRAM.replace("sm80 sm86", "sm89").replace('input={"x" "w"', 'input={"z" "half"')
    audit = audit_plan(write_plan(tmp_path / "e.plan", PROGRAM, second, other_target), {Q: "int8"})
    assert audit.modules[0].found == ("float16", "int8", WEIGHT_ONLY)
    assert (audit.profiles, audit.targets) == (2, ("SM80", "SM86", "SM89"))
    assert [(program.profile, program.targets) for program in audit.programs] == [
        (0, ("SM80", "SM86")),
        (0, ("SM89",)),
        (1, ("SM80", "SM86")),
    ]


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ((1, 7, 1, 116), "read from the program text of TensorRT-RTX 1.7.1.116"),
        (
            (1, 8, 0, 3),
            "read from the program text of TensorRT-RTX 1.8.0.3; the format is undocumented and was checked with "
            "TensorRT-RTX 1.7 only",
        ),
    ],
)
def test_the_release_that_was_checked_is_told_from_others(
    tmp_path: Path, version: tuple[int, ...], sentence: str
) -> None:
    plan = write_plan(tmp_path / "e.plan", PROGRAM, version=version)
    assert read_plan_text(plan).version == version
    assert audit_plan(plan, {}).evidence.sentence == sentence


@pytest.mark.parametrize(
    ("content", "installed", "gpu", "reason"),
    [
        (b"vtrt", {"tensorrt-rtx"}, None, "a plan of TensorRT-RTX 1.7.1.116 and holds no program text"),
        # Not even on a GPU is it loaded.
        (b"vtrt", {"tensorrt-rtx"}, Gpu("RTX 4090", "SM89"), "a plan of TensorRT-RTX 1.7.1.116 and holds no program"),
        (b"ftrt", {"tensorrt-rtx"}, None, "is no plan of TensorRT-RTX and holds no program text, and the engine"),
        (b"ftrt", set(), None, "the engine inspector needs an NVIDIA GPU, and none was found"),
        (b"ftrt", {"tensorrt-rtx"}, Gpu("H200", "SM90"), "the engine inspector needs TensorRT; run: pip install"),
    ],
)
def test_what_cannot_be_read_is_not_provable(
    tmp_path: Path, content: bytes, installed: set[str], gpu: Gpu | None, reason: str
) -> None:
    plan = write_plan(tmp_path / "engine.plan")
    plan.write_bytes(content + plan.read_bytes()[4:])
    reading = read_plan(plan, Machine(frozenset(installed), gpu))  # type: ignore[arg-type]
    assert reading.programs == ()
    assert reading.found_of(Q) == (NOT_FOUND,)
    assert reading.evidence.sentence.startswith("not provable: engine.plan is ")
    assert reason in reading.evidence.sentence


def write_sidecar(plan: Path) -> None:
    """Describe a plan as its build does."""
    sidecar = PlanSidecar(
        backend=BackendVersion(name="tensorrt", version="11.3.0.1", reason="test"),
        targets=("SM90",),
        profiles=(),
        prefix=0,
        max_context=64,
        bundle_sha256="0",
        plan=PlanFile(sha256=hash_plan(plan), size=plan.stat().st_size),
        build_seconds=1.0,
        peak_memory=1,
        audit=Audit(readable=False, int8_products=0, other_products=0, modules={}),
    )
    sidecar_path(plan).write_text(sidecar_text(sidecar))


def test_a_plan_of_tensorrt_is_loaded_only_if_it_is_ours_or_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    nothing = PlanReading(Evidence("none", "TensorRT", "test"))
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setattr(reader, "inspect_engine", lambda _, plan: (loaded.append(plan), nothing)[1])
    machine = Machine(frozenset({"tensorrt"}), Gpu("H200", "SM90"))
    plan = write_plan(tmp_path / "engine.plan")
    plan.write_bytes(b"ftrt" + plan.read_bytes()[4:])

    with pytest.raises(EngineError, match=r"engine.plan is a foreign plan of TensorRT .*: give --trust-plan"):
        read_plan(plan, machine)
    write_sidecar(plan)
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match=r"its bytes have changed.*: give --trust-plan"):
        read_plan(plan, machine)
    assert loaded == []
    read_plan(plan, machine, trusted=True)
    write_sidecar(plan)
    read_plan(plan, machine)
    assert loaded == [plan, plan]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    environment = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), None), None)
    options = BuildOptions(targets=("SM86",))
    build_plan(write_bundle(folder / "b"), folder / "e.plan", options, environment=environment)
    return folder / "e.plan"


def audit_of(plan: Path, old: bytes, new: bytes, folder: Path) -> PlanAudit:
    data = plan.read_bytes()
    assert old in data
    (folder / "e.plan").write_bytes(data.replace(old, new))
    return audit_plan(folder / "e.plan", TinyModel().planned)


@needs_rtx
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"  fully_connected={", b"  fully_konnected={"),
        (b"main {\n", b"body {\n"),
        (b'input={"', b'inputs{"'),
        (b" type=int8", b" kind=int8"),
        (b"  tensor={", b"  tenzor={"),
        (b".MatMul", b".MatMal"),
    ],
)
def test_a_change_of_format_does_not_pass(plan: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    """A real plan whose text says the same in other words: no module is proved any more."""
    assert audit_plan(plan, TinyModel().planned).deviations == ()
    audit = audit_of(plan, old, new, tmp_path)
    assert {module.module for module in audit.deviations} == set(TinyModel().planned)


@needs_rtx
def test_a_plan_without_programs_is_recognised(plan: Path, tmp_path: Path) -> None:
    audit = audit_of(plan, b"descriptors {", b"descriptions{", tmp_path)
    assert not audit.readable
    assert audit.evidence.source == "none"


@needs_rtx
def test_a_profile_whose_program_is_not_recognised_does_not_pass(plan: Path) -> None:
    """The verdict would else be that over the other profile."""
    data = plan.read_bytes()
    place = data.rindex(b"accelerators={")
    other = plan.with_name("other.plan")
    other.write_bytes(data[:place] + data[place:].replace(b"accelerators={", b"akzelerators={"))
    planned, reading = TinyModel().planned, read_program_text(other)
    assert [program.profile for program in reading.programs] == [0]
    assert judge(reading, planned).deviations == ()
    audit = judge(covering(reading, 2), planned)
    assert {module.module for module in audit.deviations} == set(planned)
    assert not audit.readable
    assert audit.evidence.sentence == "not provable: no program of profile 1 was found in the plan"
    whole = read_program_text(plan)
    assert covering(whole, 2) is whole


@needs_rtx
def test_the_version_in_a_plan_is_the_compiler_s(plan: Path) -> None:
    trt = pytest.importorskip(TENSORRT_RTX.module)
    assert ".".join(str(number) for number in read_plan_text(plan).version) == trt.__version__
