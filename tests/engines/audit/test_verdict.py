"""The audit tells a sabotaged graph from a good one, and says when it can tell nothing."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.recipe import Dtype
from spike_export.checkpoint.modules import linears
from spike_export.engines.audit.reading import NARROW_SUMS
from spike_export.engines.audit.verdict import NOT_FOUND, WEIGHT_ONLY, ModuleAudit, PlanAudit
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BuildOptions, ProfileName
from spike_export.engines.plan.graph import planned_precisions
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.built_plans import audit_plan, build_plan
from tests.support.tiny.bundles import TinyModel, tiny_graph, write_bundle
from tests.support.tiny.cli_models import call
from tests.support.tiny.families import tiny_family
from tests.support.tiny.models import tiny_recipe

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

LAYER = "model.layers.0"
WRONG = (f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj")


def audit(model: TinyModel, folder: Path, *profiles: ProfileName) -> PlanAudit:
    bundle = write_bundle(folder / "bundle", model)
    environment = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), None), None)
    options = BuildOptions(targets=("SM86",), profiles=profiles)
    build_plan(bundle, folder / "engine.plan", options, environment=environment)
    return audit_plan(folder / "engine.plan", model.planned)


@needs_rtx
@pytest.mark.parametrize("profiles", [("prefill",), ("decode",), ("prefill", "decode")])
def test_negative_control_a_wrong_axis_is_found_out(tmp_path: Path, profiles: tuple[ProfileName, ...]) -> None:
    found = audit(TinyModel(wrong_axis=WRONG), tmp_path, *profiles)
    assert {module.module for module in found.deviations} == set(WRONG)
    for module in found.deviations:
        assert module.planned == "int8"
        assert "int8" not in module.found
        assert NOT_FOUND not in module.found
    assert found.profiles == len(profiles)


SABOTAGED: Mapping[str, TinyModel] = {
    "scale along K": TinyModel(wrong_axis=WRONG),
    "FP16 scales": TinyModel(half_scales=WRONG),
    "scale made at run time": TinyModel(runtime_scale=WRONG),
}

FALLBACKS: Mapping[str, str] = {
    "scale along K": WEIGHT_ONLY,
    "FP16 scales": NARROW_SUMS["int8"],
    "scale made at run time": WEIGHT_ONLY,
}
"""What becomes of the sabotaged modules; FP16 scales leave the operands INT8, and their sums overflow."""


RTX = ("--backend", "tensorrt-rtx")


@needs_rtx
@pytest.mark.parametrize("fault", SABOTAGED)
def test_a_planted_fault_is_refused_on_all_default_targets(tmp_path: Path, fault: str) -> None:
    bundle, plan = write_bundle(tmp_path / "bundle", SABOTAGED[fault]), tmp_path / "engine.plan"
    done = call("build", bundle, "--out", plan, *RTX)
    assert done.code == 1
    assert f"{WRONG[0]} and 1 more does not run in the planned precision" in done.err
    done = call("inspect", plan, "--json")
    document = json.loads(done.out)
    assert done.code == 1
    assert set(document["targets"]) == set(TENSORRT_RTX.default_targets)
    assert set(document["deviations"]) == set(WRONG)
    assert document["layer"]["layer"] == 0  # the only one
    for module in WRONG:
        assert document["modules"][module] == {"planned": "int8", "found": [FALLBACKS[fault]], "as_planned": False}


@needs_rtx
def test_a_fallback_can_be_accepted_and_the_graph_without_faults_needs_not(tmp_path: Path) -> None:
    wrong, good = (
        write_bundle(tmp_path / name, model) for name, model in [("w", TinyModel(half_scales=WRONG)), ("g", None)]
    )
    one = ("--target", "SM86", *RTX)
    assert call("build", wrong, "--out", tmp_path / "w.plan", *one, "--allow-fallback").code == 0
    assert call("build", good, "--out", tmp_path / "g.plan", *one).code == 0


@needs_rtx
def test_negative_control_a_module_quantized_against_the_plan_is_found_out(tmp_path: Path) -> None:
    audit(TinyModel(), tmp_path, "decode")
    module = f"{LAYER}.mlp.up_proj"
    found = audit_plan(tmp_path / "engine.plan", {module: "float16", "model.layers.9.mlp.up_proj": "int8"})
    assert found.modules == (
        ModuleAudit(module, "float16", ("int8",)),
        ModuleAudit("model.layers.9.mlp.up_proj", "int8", (NOT_FOUND,)),
    )
    assert found.deviations == found.modules


@needs_rtx
def test_every_linear_may_be_kept(tmp_path: Path) -> None:
    everything = TinyModel()
    found = audit(TinyModel(kept=everything.modules), tmp_path, "prefill", "decode")
    assert found.deviations == ()
    assert found.int8_products == 0


@needs_rtx
def test_a_product_under_an_invented_name_is_known_by_the_layers_it_stands_for(tmp_path: Path) -> None:
    """The compiler takes Phi-3's fused projections apart at their slices, and puts them together again."""
    checkpoint = tiny_family("phi3", head_dim=16, num_hidden_layers=2).checkpoint
    kept: dict[str, Dtype] = dict.fromkeys(linears(checkpoint.config), "float16")
    options = ExportOptions("float16", cache=CacheOptions("static", 48))
    export_bundle(checkpoint, tiny_recipe(checkpoint, {}, kept=kept, prefix=(1, 5, 7)), options, tmp_path / "b")
    environment = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), None), None)
    build = BuildOptions(targets=("SM86",), profiles=("prefill",))
    result = build_plan(tmp_path / "b", tmp_path / "engine.plan", build, environment=environment)

    fused = f"{LAYER}.self_attn.qkv_proj.MatMul"
    text = result.plan.read_bytes().decode("latin-1")
    assert f'fully_connected={{ name="{fused}"' not in text  # else this proves nothing
    assert f'layers="[ONNX Layer: {fused}]"' in text
    assert {module.module: module.found for module in result.audit.modules} == dict.fromkeys(
        (*kept, "lm_head"), ("float16",)
    )
    wrong = dict.fromkeys(kept, "int8")
    assert {module.module for module in audit_plan(result.plan, wrong).deviations} == set(wrong)


@pytest.mark.parametrize(
    ("planned", "found", "verdict"),
    [
        ("int8", ("int8",), True),
        ("int8", ("float32", "int8"), False),  # INT8 in one profile only
        ("int8", ("int8", NOT_FOUND), False),
        ("int8", (WEIGHT_ONLY,), False),
        ("float16", ("float16",), True),
        ("float16", ("int8",), False),
        ("float16", (WEIGHT_ONLY,), False),
        ("float16", (NOT_FOUND,), False),
        ("int8", (NARROW_SUMS["int8"],), False),
        ("float16", (NARROW_SUMS["int8"],), False),
        ("float16+int8-weights", (WEIGHT_ONLY,), True),
        ("float16+int8-weights", ("float16",), False),
        ("float16+int8-weights", ("float16", WEIGHT_ONLY), False),
        ("float16+int8-weights", ("int8",), False),
        ("float16+int8-weights", (NOT_FOUND, WEIGHT_ONLY), False),
    ],
)
def test_the_verdict_is_about_every_profile(planned: str, found: tuple[str, ...], verdict: bool) -> None:
    assert ModuleAudit("m", planned, found).as_planned is verdict


def test_a_plan_without_program_text_proves_nothing(tmp_path: Path) -> None:
    plan = tmp_path / "engine.plan"
    plan.write_bytes(b"ftrt" + bytes(1000))
    found = audit_plan(plan, {"m": "int8"})
    assert not found.readable
    assert found.modules == (ModuleAudit("m", "int8", (NOT_FOUND,)),)


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_or_empty_plan_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    plan = tmp_path / "engine.plan"
    if content is not None:
        plan.write_bytes(content)
    with pytest.raises(EngineError, match=r"engine\.plan: cannot read the plan"):
        audit_plan(plan, {})


def test_the_plan_of_a_graph_is_read_from_its_quantizers() -> None:
    model = TinyModel(kept=(f"{LAYER}.mlp.down_proj",))
    assert planned_precisions(tiny_graph(model)) == model.planned | {"lm_head": "float16"}


def test_what_the_exporter_noted_counts_more_than_the_quantizers() -> None:
    graph = tiny_graph(TinyModel())
    node = next(node for node in graph.graph.node if node.name == f"{LAYER}.mlp.up_proj.MatMul")
    node.metadata_props.add(key="precision", value="bfloat16")
    assert planned_precisions(graph)[f"{LAYER}.mlp.up_proj"] == "bfloat16"


@pytest.mark.parametrize("cast", [True, False])
def test_int8_weights_under_a_floating_point_product_are_read_from_the_quantizers(cast: bool) -> None:
    """By the type that the weight is restored in, last of all by a Cast."""
    graph = tiny_graph(TinyModel())
    name = f"{LAYER}.mlp.up_proj"
    nodes = {node.name: node for node in graph.graph.node}
    nodes[f"{name}.MatMul"].input[0] = nodes[f"{name}.Cast_in"].input[0]
    if cast:
        half = onnx.helper.make_node(
            "Cast", [f"{name}.DequantizeWeight:0"], [f"{name}.half"], name=f"{name}.half", to=onnx.TensorProto.FLOAT16
        )
        graph.graph.node.append(half)
        nodes[f"{name}.MatMul"].input[1] = f"{name}.half"
    precision = "float16" if cast else "float32"
    assert planned_precisions(graph) == TinyModel().planned | {
        name: f"{precision}+int8-weights",
        "lm_head": "float16",
    }
