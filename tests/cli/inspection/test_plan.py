"""`inspect PLAN`: what runs, for every default target, with the sidecar and without."""

import importlib.util
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.recipe import Dtype
from spike_export.checkpoint.modules import linears
from spike_export.cli.terminal.text_table import counts_in_words, ranges, size_in_words
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine, find_gpu
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.sidecar import load_sidecar
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.engines.audit.test_kernel_count import LAYERS, MOST, checkpoint
from tests.support.built_plans import build_plan
from tests.support.tiny.cli_models import call
from tests.support.tiny.models import tiny_recipe

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
KEPT: dict[str, Dtype] = {"model.layers.1.mlp.down_proj": "float16", "model.layers.2.self_attn.o_proj": "float16"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all default targets and both profiles; two linears are kept."""
    folder = tmp_path_factory.mktemp("inspect")
    source = checkpoint()
    recipe = tiny_recipe(source, dict.fromkeys(linears(source.config), 0.02), kept=KEPT, prefix=(1, 5, 7))
    export_bundle(source, recipe, ExportOptions("float16"), folder / "bundle")
    build_plan(folder / "bundle", folder / "engine.plan", BuildOptions(), environment=CPU)
    return folder / "engine.plan"


def document(plan: Path, code: int = 0) -> Any:
    done = call("inspect", plan, "--json")
    assert (done.code, done.err) == (code, "")
    return json.loads(done.out)


@needs_rtx
def test_every_linear_is_listed_in_its_precision_on_every_target(plan: Path) -> None:
    found = document(plan)
    expected = {name: KEPT.get(name, "int8") for name in linears(checkpoint().config)} | {"lm_head": "float16"}
    assert found["modules"] == {
        name: {"planned": precision, "found": [precision], "as_planned": True} for name, precision in expected.items()
    }
    assert found["targets"] == list(TENSORRT_RTX.default_targets)
    assert found["evidence"]["sentence"].startswith("read from the program text of TensorRT-RTX 1.7.")
    assert [program["name"] for program in found["programs"]] == ["prefill", "decode"]
    for program in found["programs"]:
        assert program["targets"] == found["targets"]
        assert {name for name, size in program["weight_bytes"].items() if size} >= {"int8", "float16", "float32"}
    decode = found["programs"][1]
    assert max(decode["layer_kernels"]) <= MOST
    assert decode["attention"] == {"_gemv_mha_v1": LAYERS}
    layer = found["layer"]
    assert (layer["program"], layer["layer"], len(layer["kernels"])) == ("decode", 1, decode["layer_kernels"][1])
    assert found["profiles"][1]["inputs"]["input_ids"]["max"] == [1, 1]


@needs_rtx
def test_the_sidecar_holds_what_was_found(plan: Path) -> None:
    audit, found = load_sidecar(plan).audit, document(plan)
    assert audit.evidence == found["evidence"]["sentence"]
    assert [
        {"name": name} | json.loads(json.dumps(asdict(program)))
        for name, program in zip(("prefill", "decode"), audit.programs, strict=True)
    ] == found["programs"]


@needs_rtx
def test_the_tables_say_the_same(plan: Path) -> None:
    done = call("inspect", plan)
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "targets: SM80, SM86, SM89, SM120" in lines
    assert "mlp.down_proj int8 int8 0, 2" in lines
    assert "mlp.down_proj float16 float16 1" in lines
    assert "mlp.gate_proj int8 int8 0-2 up_proj" in lines
    assert "matrix product mlp.up_proj + mlp.gate_proj (int8)" in lines
    assert "_gemv_mha_v1 self_attn.Attention" in lines
    assert any(
        line.startswith("decode past_key_values.0.key ... past_key_values.2.value [1, 2, 4, 64]") for line in lines
    )
    assert lines[-1] == "verdict: all 22 linears run as planned"


def changed_sidecar(plan: Path, folder: Path, module: str, planned: str) -> Path:
    sidecar = json.loads(plan.with_suffix(".json").read_text())
    sidecar["audit"]["modules"][module]["planned"] = planned
    (folder / "engine.json").write_text(json.dumps(sidecar))
    return Path(shutil.copy(plan, folder / "engine.plan"))


@needs_rtx
@pytest.mark.parametrize(
    ("module", "planned", "found"),
    [("model.layers.1.mlp.down_proj", "int8", "float16"), ("model.layers.0.mlp.up_proj", "float16", "int8")],
)
def test_what_deviates_is_found_in_the_plan_not_believed_from_the_sidecar(
    plan: Path, tmp_path: Path, module: str, planned: str, found: str
) -> None:
    other = changed_sidecar(plan, tmp_path, module, planned)
    assert document(other, code=1)["deviations"] == [module]
    done = call("inspect", other)
    assert done.code == 1
    assert f"NOT AS PLANNED: {module}: {planned} runs in {found}" in done.out
    assert "verdict: 1 of 22 linears do not run as planned" in done.out


@needs_rtx
def test_without_its_sidecar_a_plan_still_tells_what_runs(plan: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(plan, tmp_path / "alone.plan"))
    found = document(alone)
    assert found["modules"]["model.layers.0.mlp.up_proj"] == {"planned": None, "found": ["int8"], "as_planned": None}
    assert found["modules"].keys() == document(plan)["modules"].keys()
    assert [program["name"] for program in found["programs"]] == ["profile 0", "profile 1"]
    assert found["note"].startswith("no alone.json beside it; what was planned")
    out = call("inspect", alone).out
    assert "mlp.down_proj" in out
    assert "verdict: what was planned is not known; see above what runs" in out


@needs_rtx
def test_a_sidecar_of_another_plan_is_not_used(plan: Path, tmp_path: Path) -> None:
    longer = tmp_path / "engine.plan"
    longer.write_bytes(plan.read_bytes() + b"\0")
    shutil.copy(plan.with_suffix(".json"), tmp_path / "engine.json")
    found = document(longer, code=1)
    assert "engine.json belongs to a plan of" in found["note"]
    assert found["backend"] is None
    longer.write_bytes(plan.read_bytes()[:-1])  # as a copy that was cut short
    assert "engine.json belongs to a plan of" in document(longer, code=1)["note"]


@needs_rtx
def test_a_plan_that_cannot_be_read_proves_nothing(plan: Path, tmp_path: Path) -> None:
    """A planned precision that is not proved is not passed."""
    data = plan.read_bytes().replace(b"descriptors {", b"descriptions{")
    (tmp_path / "engine.plan").write_bytes(data)
    shutil.copy(plan.with_suffix(".json"), tmp_path / "engine.json")
    done = call("inspect", tmp_path / "engine.plan")
    assert done.code == 1
    assert "evidence: not provable: engine.plan is a plan of TensorRT-RTX 1.7." in done.out
    assert done.out.splitlines()[-1] == "verdict: nothing is proved of 22 linears"
    (tmp_path / "engine.json").unlink()
    assert document(tmp_path / "engine.plan")["modules"] == {}


@needs_rtx
def test_a_plan_one_of_whose_profiles_cannot_be_read_proves_nothing(plan: Path, tmp_path: Path) -> None:
    data = plan.read_bytes()
    place = data.rindex(b"accelerators={")
    (tmp_path / "engine.plan").write_bytes(data[:place] + data[place:].replace(b"accelerators={", b"akzelerators={"))
    shutil.copy(plan.with_suffix(".json"), tmp_path / "engine.json")
    done = call("inspect", tmp_path / "engine.plan")
    assert done.code == 1
    assert "evidence: not provable: no program of profile 1 was found in the plan" in done.out
    assert done.out.splitlines()[-1] == "verdict: nothing is proved of 22 linears"


@needs_rtx
def test_both_halves_of_a_split_engine_are_shown(plan: Path, tmp_path: Path) -> None:
    """Whatever they hold: here the same plan twice, under their names."""
    for name in ("prefill", "decode"):
        shutil.copy(plan, tmp_path / f"engine.{name}.plan")
        shutil.copy(plan.with_suffix(".json"), tmp_path / f"engine.{name}.json")
    found = document(tmp_path / "engine.plan")
    assert [Path(each["plan"]).name for each in found] == ["engine.prefill.plan", "engine.decode.plan"]
    (tmp_path / "engine.decode.plan").unlink()
    assert (
        "engine.decode.plan is missing, the other half of the engine is there"
        in call("inspect", tmp_path / "engine.plan").error
    )
    assert "there is no such file or folder" in call("inspect", tmp_path / "run").error


@pytest.mark.parametrize("content", [b"", b"# a text\n", b"vtrt", b"ftrt"])
def test_what_is_no_plan(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "engine.plan"
    file.write_bytes(content)
    assert f"{file}: not a TensorRT or TensorRT-RTX plan" in call("inspect", file).error


@pytest.mark.skipif(find_gpu() is not None, reason="on a GPU it is loaded")
def test_a_plan_of_tensorrt_proves_nothing_without_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "engine.plan"
    file.write_bytes(b"ftrt" + bytes(100))
    done = call("inspect", file)
    assert done.code == 0  # nothing is known to have been planned
    assert "evidence: not provable: engine.plan is no plan of TensorRT-RTX and holds no program text" in done.out
    assert done.out.splitlines()[-1] == "verdict: nothing is proved"


def test_explanations_are_of_runs(tmp_path: Path) -> None:
    (tmp_path / "e.plan").write_bytes(b"x")
    line = call("inspect", tmp_path / "e.plan", "--explain", "0.mlp.down_proj").error
    assert "--explain needs the work directory of a run, and this is a plan; leave --explain out" in line


def test_numbers_in_words() -> None:
    assert ranges([0, 1, 2, 9, 11, 12]) == "0-2, 9, 11-12"
    assert ranges([]) == ""
    assert counts_in_words((12, 12)) == "12"
    assert counts_in_words((13, 12, 12)) == "13 (0), 12 (1-2)"
    assert counts_in_words(()) == ""
    assert [size_in_words(size) for size in (0, 999, 1000, 64842242, 334942380)] == [
        "0",
        "999",
        "1000 (1.0 kB)",
        "64842242 (64.8 MB)",
        "334942380 (335 MB)",
    ]
