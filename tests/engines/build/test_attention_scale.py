"""A scale of attention's scores other than 1 / sqrt(head_dim) reaches the plan."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.built_plans import build_plan
from tests.support.tiny.families import tiny_family

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)


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
