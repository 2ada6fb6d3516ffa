"""What the exporter writes, the compiler takes: every variant of the graph, each linear in its planned precision."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.calibration.recipe import Dtype, Scheme, WeightScheme
from spike_export.engines.build_options import BatchRange, BuildOptions
from spike_export.engines.plan_backend import TENSORRT_RTX, Machine
from spike_export.engines.plan_builder import BuildEnvironment, build_plan
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.tiny_models import LLAMA3_ROPE, input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
KEPT = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("case", "dtype", "weights", "prefix"),
    [
        ({}, "float16", "int8-per-channel", (1, 5, 7)),
        ({}, "float16", "int8-per-channel", ()),
        ({}, "bfloat16", "int8-per-channel", (1,)),
        ({}, "float32", "int8-per-channel", (1,)),
        ({"tie": True, "biases": True}, "float16", "int8-per-tensor", (1,)),
        ({"rope": LLAMA3_ROPE, "sliding_window": 16}, "float16", "int8-per-channel", (1, 5, 7)),
    ],
)
def test_an_exported_bundle_runs_as_planned(
    tmp_path: Path, case: dict[str, Any], dtype: Dtype, weights: WeightScheme, prefix: tuple[int, ...]
) -> None:
    model = tiny_llama(**case)
    scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 24)))
    scheme = Scheme(weights=weights, unquantized=dtype)
    recipe = tiny_recipe(model.checkpoint, scales, kept={KEPT: dtype}, prefix=prefix, scheme=scheme)
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype=dtype), tmp_path / "bundle")
    options = BuildOptions(targets=("SM86",), batch=BatchRange(1, 1, 2))
    result = build_plan(tmp_path / "bundle", tmp_path / "engine.plan", options, environment=CPU)
    assert result.audit.readable
    assert result.deviations == ()
    planned = {module.module: module.planned for module in result.audit.modules}
    assert planned == {name: plan.precision for name, plan in recipe.modules.items()} | {"lm_head": dtype}
    assert planned[KEPT] == dtype
    assert result.sidecar.prefix == len(prefix)
