"""The real bindings have every name the code uses of them."""

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spike_export.engines.build import callbacks
from spike_export.engines.build import compiler as plan_compiler
from spike_export.engines.plan import validity as plan_validity
from spike_export.engines.plan.backend import BACKENDS, TENSORRT, TENSORRT_RTX, Backend, installed_version
from spike_export.engines.plan.build_options import DEFAULT_OPTIMIZATION_LEVEL
from spike_export.engines.tensorrt import log, refusal
from spike_export.engines.tensorrt import refit as plan_refit

SOURCES = (plan_compiler, plan_refit, plan_validity, callbacks, log, refusal)

CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "fault": "ParserError",
    "made": "IOptimizationProfile",
    "network": "INetworkDefinition",
    "runtime": "Runtime",
    "refitter": "Refitter",
    "source": "OnnxParserRefitter",
}
"""Variable in the sources → the class of the bindings it holds."""

RTX_ONLY = {
    "trt.ComputeCapability",
    "config.num_compute_capabilities",
    "config.set_compute_capability",
    "runtime.get_engine_validity",
    "trt.EngineValidity",
    "trt.EngineInvalidityDiagnostics",
}


def used_names() -> Iterator[tuple[str, ...]]:
    """Yield ("trt", "ILogger", "ERROR"), ("config", "progress_monitor"), ..."""
    for module in SOURCES:
        assert module.__file__ is not None
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            names: list[str] = []
            current: ast.AST = node
            while isinstance(current, ast.Attribute):
                names.insert(0, current.attr)
                current = current.value
            if names and isinstance(current, ast.Name) and current.id in {"trt", *CLASSES}:
                yield (current.id, *names)


def bindings(backend: Backend) -> Any:
    if importlib.util.find_spec(backend.module) is None:
        pytest.skip(f"{backend.title} is not installed: {backend.install}")
    return importlib.import_module(backend.module)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_every_name_used_exists(backend: Backend) -> None:
    trt = bindings(backend)
    used = set(used_names())
    assert ("trt", "IProgressMonitor", "__init__") in used
    for variable, *names in used:
        if backend is TENSORRT and f"{variable}.{names[0]}" in RTX_ONLY:
            continue
        found = trt if variable == "trt" else getattr(trt, CLASSES[variable])
        for name in names:
            assert hasattr(found, name), f"{backend.module}: {variable}.{'.'.join(names)}"
            found = getattr(found, name)


def test_the_targets_are_those_of_the_bindings() -> None:
    trt = bindings(TENSORRT_RTX)
    members = set(trt.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert set(TENSORRT_RTX.targets) == members
    assert set(TENSORRT_RTX.default_targets) <= members


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_the_members_of_every_table_exist(backend: Backend) -> None:
    trt = bindings(backend)
    assert {*plan_compiler.FLAGS.values(), plan_compiler.IDENTICAL_REFIT} <= set(trt.BuilderFlag.__members__)
    assert set(plan_compiler.HARDWARE_LEVELS.values()) <= set(trt.HardwareCompatibilityLevel.__members__)


def test_the_default_optimization_level_is_the_builder_s_own() -> None:
    trt = bindings(TENSORRT_RTX)
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    assert config.builder_optimization_level == DEFAULT_OPTIMIZATION_LEVEL


def test_the_version_is_told_without_the_bindings() -> None:
    assert installed_version(TENSORRT_RTX) == bindings(TENSORRT_RTX).__version__
