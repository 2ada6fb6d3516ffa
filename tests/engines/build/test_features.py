"""What TensorRT-RTX can be asked for beyond shapes and targets, and that what it is refused for it really cannot do."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.progress import silent
from spike_export.artifacts.recipe import Scheme
from spike_export.checkpoint.modules import linears
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.build.child_process import run_build
from spike_export.engines.build.request import BuildRequest, CompletionEvent
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine, PlanFeature, find_gpu
from spike_export.engines.plan.build_options import BuildOptions
from spike_export.engines.plan.graph import load_graph, resize_cache
from spike_export.engines.plan.header import HEADER_SIZE, read_header
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.support.built_plans import build_plan
from tests.support.tiny.bundles import write_bundle
from tests.support.tiny.models import tiny_llama, tiny_recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
without_gpu = pytest.mark.skipif(find_gpu() is not None, reason="shows what fails without a GPU")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def compile_with(bundle: Path, plan: Path, *features: PlanFeature) -> CompletionEvent:
    """Build without asking first whether the backend can."""
    request = BuildRequest(
        backend="tensorrt-rtx",
        graph=str(bundle / "model.onnx"),
        plan=str(plan),
        targets=("SM86",),
        profiles=("decode",),
        batch=(1, 1, 1),
        context=64,
        typical_prompt=64,
        max_prompt=64,
        prefix=3,
        optimization_level=3,
        features=frozenset(features),
        hardware_compatible="ampere-plus" if "hardware_compatible" in features else None,
    )
    return run_build(request, silent)


@without_gpu
@pytest.mark.parametrize("feature", list(TENSORRT_RTX.lacking_without_gpu))
def test_weights_that_can_be_replaced_do_not_compile_on_a_cpu(
    bundle: Path, tmp_path: Path, feature: PlanFeature
) -> None:
    """The day this builds, the feature is to be taken out of `lacking_without_gpu`."""
    with pytest.raises(EngineError, match=r"cannot build the plan: .*CUDA_SUCCESS"):
        compile_with(bundle, tmp_path / "e.plan", feature)


def test_a_lean_runtime_for_later_versions_does_not_exist(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot build the plan: .*libnvinfer_lean"):
        compile_with(bundle, tmp_path / "e.plan", "version_compatible")


def test_a_hardware_level_is_ignored_with_a_warning(bundle: Path, tmp_path: Path) -> None:
    done = compile_with(bundle, tmp_path / "e.plan", "hardware_compatible")
    assert any("setHardwareCompatibilityLevel() is unsupported" in warning for warning in done.warnings)
    assert read_header(tmp_path / "e.plan").targets == ("SM86",)


def resident_bytes(plan: Path) -> int:
    """Bytes of weights the header tells for the GPU (from place 56 on)."""
    (count,) = struct.unpack_from("<Q", plan.read_bytes()[:HEADER_SIZE], 56)
    return int(count)


def test_streamed_weights_are_not_those_that_stay_on_the_gpu(bundle: Path, tmp_path: Path) -> None:
    plain = build_plan(bundle, tmp_path / "a.plan", BuildOptions(targets=("SM86",), profiles=("decode",)), silent, CPU)
    options = BuildOptions(targets=("SM86",), profiles=("decode",), weight_streaming=True)
    streamed = build_plan(bundle, tmp_path / "b.plan", options, silent, CPU)
    assert resident_bytes(plain.plan) > 0
    assert resident_bytes(streamed.plan) == 0
    assert streamed.deviations == ()
    assert streamed.sidecar.key is not None
    assert streamed.sidecar.key.weight_streaming


CAPACITY = 40


def export_static(folder: Path, capacity: int) -> Path:
    model = tiny_llama(sliding_window=16, layers=3)
    scales = dict.fromkeys(linears(model.checkpoint.config), 0.03)
    recipe = tiny_recipe(model.checkpoint, scales, prefix=(1, 5), scheme=Scheme(unquantized="float16"))
    export_bundle(model.checkpoint, recipe, ExportOptions("float16", cache=CacheOptions("static", capacity)), folder)
    return folder


@pytest.fixture(scope="module")
def static_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_static(tmp_path_factory.mktemp("bundles") / "static", CAPACITY)


def test_a_graph_of_less_capacity_is_the_one_that_would_be_exported(static_bundle: Path, tmp_path: Path) -> None:
    small = onnx.load(str(export_static(tmp_path / "small", 16) / "model.onnx"))
    resized = onnx.load(str(static_bundle / "model.onnx"))
    assert resized.graph != small.graph
    resize_cache(resized, 2 + 16)
    # The stored order of the tensors' bytes is not a difference; their values are compared instead.
    weights, wanted = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer} for model in (resized, small)
    )
    assert weights.keys() == wanted.keys()
    assert [name for name in wanted if not np.array_equal(weights[name], wanted[name])] == []
    for part in ("node", "input", "output"):
        assert getattr(resized.graph, part) == getattr(small.graph, part), part


def test_a_plan_can_have_less_capacity_than_its_bundle(static_bundle: Path, tmp_path: Path) -> None:
    options = BuildOptions(targets=("SM86",), capacity=16)
    result = build_plan(static_bundle, tmp_path / "e.plan", options, silent, CPU)
    assert result.sidecar.max_context == 16
    for profile in result.sidecar.profiles:
        assert profile.inputs["past_key_values.0.key"].max[2] == 2 + 16
    assert result.deviations == ()
    with pytest.raises(EngineError, match="expected 2 to 40 tokens, the bundle's"):
        build_plan(static_bundle, tmp_path / "e.plan", BuildOptions(capacity=CAPACITY + 1), silent, CPU)


def test_a_dynamic_cache_has_no_length_to_change(bundle: Path) -> None:
    with pytest.raises(EngineError, match="no static cache"):
        resize_cache(load_graph(bundle / "model.onnx"), 16)
