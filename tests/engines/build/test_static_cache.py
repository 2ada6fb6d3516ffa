"""A graph with a static cache as a plan: it builds for every profile, and reads and writes one buffer."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.recipe import Scheme
from spike_export.engines.build.builder import BuildEnvironment, BuildResult
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BatchRange, BuildOptions, ProfileName
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.built_plans import build_plan
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import input_scales, tiny_llama, tiny_recipe, unquantized_recipe

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
CAPACITY = 48
LAYERS = 3  # TensorRT-RTX 1.7 forgives with two what it cannot build with three and more
KEPT = "model.layers.1.mlp.down_proj"

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)


def export(folder: Path, prefix: tuple[int, ...], cache: CacheOptions, window: int | None = None) -> Path:
    model = tiny_llama(sliding_window=window, layers=LAYERS)
    scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 24)))
    recipe = tiny_recipe(
        model.checkpoint, scales, kept={KEPT: "float16"}, prefix=prefix, scheme=Scheme(unquantized="float16")
    )
    export_bundle(model.checkpoint, recipe, ExportOptions("float16", cache=cache), folder)
    return folder


def build(bundle: Path, *profiles: ProfileName) -> BuildResult:
    options = BuildOptions(targets=("SM86",), batch=BatchRange(1, 1, 2), profiles=profiles)
    return build_plan(bundle, bundle.with_suffix(".plan"), options, environment=CPU)


def program_buffers(plan: Path) -> list[tuple[set[str], set[str]]]:
    """Names of the cache's tensors among the inputs and outputs of each program in a plan."""
    text = plan.read_bytes().decode("latin-1")
    lists = re.findall(r"\n\s*inputs=\{([^}]*)\}.*?\n\s*outputs=\{([^}]*)\}", text, re.DOTALL)
    sides = [tuple(set(re.findall(r"(?:past_key_values|present)\.\d+\.\w+", side)) for side in pair) for pair in lists]
    return [(read, written) for read, written in sides if read or written]


@needs_rtx
@pytest.mark.parametrize(
    ("profiles", "prefix", "window"),
    [
        (("prefill",), (1, 5, 7), None),
        (("decode",), (1, 5, 7), None),
        (("prefill", "decode"), (1, 5, 7), 16),
        (("prefill", "decode"), (), None),
    ],
)
def test_it_builds_as_planned_and_in_place(
    tmp_path: Path, profiles: tuple[ProfileName, ...], prefix: tuple[int, ...], window: int | None
) -> None:
    bundle = export(tmp_path / "bundle", prefix, CacheOptions("static", CAPACITY), window)
    result = build(bundle, *profiles)
    assert result.audit.readable
    assert result.deviations == ()
    assert {module.module for module in result.audit.modules if module.planned == "float16"} == {KEPT, "lm_head"}
    assert (result.sidecar.prefix, result.sidecar.max_context) == (len(prefix), CAPACITY)
    # What is read is what is written: one buffer per layer and kind, under the name of the output.
    buffers = {f"present.{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")}
    assert program_buffers(result.plan) == [(buffers, buffers)] * len(profiles)


@needs_rtx
def test_a_dynamic_cache_is_not_in_place(tmp_path: Path) -> None:
    """The control of the test above: here pasts are read, and presents are tensors of their own."""
    plan = build(export(tmp_path / "bundle", (1,), CacheOptions()), "decode").plan
    places = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    read, written = ({f"{stem}.{place}" for place in places} for stem in ("past_key_values", "present"))
    assert program_buffers(plan) == [(read, written)]


def test_a_cache_in_int8_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    recipe = with_kv_cache(unquantized_recipe(model.checkpoint, ()), model.checkpoint, np.full((1, 8), 3))
    options = ExportOptions("float16", cache=CacheOptions("static", CAPACITY))
    export_bundle(model.checkpoint, recipe, options, tmp_path / "bundle")
    with pytest.raises(EngineError, match="does not write into a static cache in INT8; export with --kv-cache dynamic"):
        build_plan(tmp_path / "bundle", tmp_path / "engine.plan", BuildOptions(), environment=CPU)


def test_more_context_than_the_cache_holds_is_refused(tmp_path: Path) -> None:
    bundle = export(tmp_path / "bundle", (), CacheOptions("static", CAPACITY))
    options = BuildOptions(max_context=CAPACITY + 1)
    with pytest.raises(EngineError, match=f"static cache holds {CAPACITY} tokens; export with a larger --capacity"):
        build_plan(bundle, tmp_path / "engine.plan", options, environment=CPU)
