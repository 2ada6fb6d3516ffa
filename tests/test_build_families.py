"""Every dense family's graph becomes a TensorRT-RTX plan whose linears are INT8; with the ropes that are computed."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spike_export.engines.build_options import BuildOptions
from spike_export.engines.plan_backend import TENSORRT_RTX, Machine
from spike_export.engines.plan_builder import BuildEnvironment, build_plan
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.tiny_families import tiny_family, tokens
from tests.tiny_models import input_scales, tiny_recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
    "short_factor": [1.1] * 8,
    "long_factor": [2.0] * 8,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gemma": {},
    # Two layers have the two kinds of window, and of rope.
    "gemma2": {"num_hidden_layers": 2},
    "gemma3_text": {"num_hidden_layers": 2},
    "granite": {"head_dim": 16, "rope_parameters": DYNAMIC},
    "olmo2": {"head_dim": 16},
    "phi3": {"head_dim": 16, "rope_parameters": PARTIAL},
    "qwen3": {"head_dim": 16, "rope_parameters": LONG},
}
"""Families whose blocks are not LLaMA's → changes; the ropes that are more than a table are spread over them.

Heads are 16 wide: with 12, which no real model has, the compiler fails at some graphs, those of LLaMA included.
"""

PRODUCTS = 4
"""INT8 products of a layer once siblings are merged: q with k and v, o, gate with up, down."""


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_of_a_family_is_int8_in_the_plan(tmp_path: Path, name: str) -> None:
    model = tiny_family(name, **{"num_hidden_layers": 1, **FAMILIES[name]})
    layers = model.checkpoint.config.num_hidden_layers
    recipe = tiny_recipe(model.checkpoint, input_scales(model, tokens()), prefix=(1, 5, 7))
    export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / "bundle")
    # One profile is half the time; decode is the one whose small products are fused in most ways.
    options = BuildOptions(targets=("SM86",), profiles=("decode",))
    result = build_plan(tmp_path / "bundle", tmp_path / "engine.plan", options, environment=CPU)
    assert result.audit.readable
    assert result.deviations == ()
    planned = {module.module: module.planned for module in result.audit.modules}
    assert planned == dict.fromkeys(recipe.modules, "int8") | {"lm_head": "float16"}
    assert result.audit.int8_products == PRODUCTS * layers


def test_the_compiler_multiplies_by_the_scale_of_the_scores(tmp_path: Path) -> None:
    """The importer ignores some attributes in silence; this one stands in the plan, as its root for query and key."""
    scales, plans = (0.3391, 0.0737), []
    for scale in scales:
        model, folder = tiny_family("granite", num_hidden_layers=1, head_dim=16, attention_multiplier=scale), tmp_path
        export_bundle(model.checkpoint, None, ExportOptions("float16"), folder / f"{scale}")
        options = BuildOptions(targets=("SM86",), profiles=("decode",))
        result = build_plan(folder / f"{scale}", folder / f"{scale}.plan", options, environment=CPU)
        plans.append(places(result.plan.read_bytes(), np.float16(scale**0.5).tobytes()))
    # Two bytes occur by chance somewhere, but not each root at the same place of its own plan.
    assert plans[0] & plans[1]


def places(content: bytes, pattern: bytes) -> set[int]:
    return {match.start() for match in re.finditer(re.escape(pattern), content)}
