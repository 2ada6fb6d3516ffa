"""The compiler takes mixtures of experts: every expert in its planned precision, the router in float32."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.recipe import ModulePlan
from spike_export.checkpoint.modules import expert_of, is_down_projection, is_router, split_name
from spike_export.engines.audit.verdict import WEIGHT_ONLY
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.export.test_mixture_of_experts import PREFIX, Case, block, expert, mixture, recipe_of
from tests.support.built_plans import audit_plan, build_plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)

FEW: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2},
}
"""Experts enough for one to be kept, and few to compile."""

KEPT = ModulePlan(precision="float16", ratio=900.5, reason="test")
WEIGHTS = ModulePlan(precision="float16", weights="int8")


@pytest.mark.parametrize(
    ("name", "case", "found_in_expert"),
    [
        ("mixtral", Case(expert=KEPT, prefix=PREFIX), "float16"),
        ("qwen3_moe", Case(expert=WEIGHTS, per_token=True), WEIGHT_ONLY),
    ],
)
def test_every_expert_runs_as_planned(tmp_path: Path, name: str, case: Case, found_in_expert: str) -> None:
    checkpoint = mixture(name, **FEW[name]).checkpoint
    recipe = recipe_of(name, case, checkpoint, "float16")
    export_bundle(checkpoint, recipe, ExportOptions("float16"), tmp_path / "b")
    result = build_plan(tmp_path / "b", tmp_path / "e.plan", BuildOptions(targets=("SM86",)), environment=CPU)
    assert result.audit.readable
    assert result.deviations == ()
    found = {module.module: module.found for module in result.audit.modules}
    assert found.pop("lm_head") == ("float16",)
    assert found.keys() == recipe.modules.keys()
    for module, precisions in found.items():
        if is_router(module):
            assert precisions == ("float32",)
        elif module.startswith(f"{block(name, 1)}.experts.2."):
            assert precisions == (found_in_expert,)
        else:
            assert precisions == ("int8",)
    # Must fail: had an expert that is kept been planned in INT8, or the other way round, the audit would object.
    swapped = {expert(name, 1, 2, "down"): "int8", expert(name, 1, 1, "down"): "float16"}
    assert {module.module for module in audit_plan(result.plan, swapped).deviations} == set(swapped)
    # Gate and up of all experts whose input has the same scale (per token: one for all) are one product.
    quantized = {module: plan for module, plan in recipe.modules.items() if plan.precision == "int8"}
    scales = {
        (split_name(module)[0], plan.activation_scale if plan.activations == "static" else None)
        for module, plan in quantized.items()
        if expert_of(module) is not None and not is_down_projection(module)
    }
    downs = [module for module in quantized if is_down_projection(module)]
    attention = 2 * 2  # q+k+v and o of two layers
    assert result.audit.int8_products == result.audit.profiles * (attention + len(scales) + len(downs))
