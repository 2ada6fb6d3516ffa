"""What the runtime asks of TensorRT exists in the real bindings: names, numbers of arguments, what can be assigned."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from spike_export.engines.plan.backend import BACKENDS, TENSORRT, TENSORRT_RTX, Backend
from spike_export.engines.tensorrt import engines as trt_engines
from spike_export.engines.tensorrt import plan_io as trt_plan_io
from spike_export.engines.tensorrt import runtime_cache as trt_runtime_cache
from spike_export.engines.tensorrt import station as trt_station
from spike_export.engines.tensorrt.engines import Specialization
from spike_export.engines.tensorrt.plan_io import _TORCH_TYPES
from tests.support.trt_simulation import (
    RTX_ONLY,
    SimulatedConfig,
    SimulatedContext,
    SimulatedEngine,
    SimulatedRuntimeCache,
)

SOURCES: tuple[ModuleType, ...] = (trt_engines, trt_plan_io, trt_runtime_cache, trt_station)

CLASSES = {
    "engine": "ICudaEngine",
    "_engines": "ICudaEngine",
    "_context": "IExecutionContext",
    "context": "IExecutionContext",
    "config": "IRuntimeConfig",
    "_runtime": "Runtime",
    "handle": "IRuntimeCache",
    "strategies": "CudaGraphStrategy",
    "trt": "",
    "_trt": "",
}
"""Variable or attribute in the sources → the class of the bindings it holds; nothing for the bindings themselves."""

LISTS = {"_engines"}
"""Of these, an element is such an object."""

CONFIGURATION = {"engine.create_runtime_config"}


@dataclass(frozen=True)
class Use:
    """An attribute used on an object of the bindings."""

    owner: str
    names: tuple[str, ...]
    arguments: int | None = None
    assigned: bool = False

    @property
    def text(self) -> str:
        return ".".join((self.owner, *self.names))


def uses() -> Iterator[Use]:
    for module in SOURCES:
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        targets = {id(target) for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (found := _owner(node)) is not None:
                call = calls.get(id(node))
                arguments = None if call is None else len(call.args) + len(call.keywords)
                yield Use(*found, arguments, id(node) in targets)


def _owner(node: ast.Attribute) -> tuple[str, tuple[str, ...]] | None:
    names: list[str] = []
    current: ast.expr = node
    while isinstance(current, ast.Attribute):
        names.insert(0, current.attr)
        current = current.value
        base = current.value if isinstance(current, ast.Subscript) else current
        name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
        if name in CLASSES and isinstance(current, ast.Subscript) == (name in LISTS):
            return name, tuple(names)
    return None


def bindings(backend: Backend) -> Any:
    if importlib.util.find_spec(backend.module) is None:
        pytest.skip(f"{backend.title} is not installed: {backend.install}")
    return importlib.import_module(backend.module)


def found(trt: Any, use: Use) -> Any:
    """Return the attribute of the real class."""
    value = getattr(trt, CLASSES[use.owner]) if CLASSES[use.owner] else trt
    for name in use.names:
        assert hasattr(value, name), f"{trt.__name__} has no {use.text}"
        value = getattr(value, name)
    return value


def numbers_of_arguments(function: Any) -> list[range]:
    """Return per overload how many arguments it takes, as pybind11 documents them."""
    result = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(rf"\s*(?:\d+\. )?{function.__name__}\((.*)\) -> ", line)
        if match and "*args" not in match.group(1):
            parameters = [part for part in _split(match.group(1)) if not part.startswith("self:")]
            optional = sum("=" in part for part in parameters)
            result.append(range(len(parameters) - optional, len(parameters) + 1))
    return result


def _split(parameters: str) -> list[str]:
    parts, depth = [""], 0
    for character in parameters:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def applies(backend: Backend, use: Use) -> bool:
    if backend is not TENSORRT:
        return True
    return not (CLASSES[use.owner] in {"IRuntimeConfig", "IRuntimeCache"} or use.text in CONFIGURATION) and not (
        RTX_ONLY & {CLASSES[use.owner], *use.names}
    )


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_names_arguments_and_assignments(backend: Backend) -> None:
    trt = bindings(backend)
    used = [use for use in uses() if applies(backend, use)]
    texts = {use.text for use in used}
    # What it must have seen, so that an empty list does not pass.
    assert {"_context.execute_async_v3", "_trt.ExecutionContextAllocationStrategy.USER_MANAGED"} <= texts
    checked = set()
    for use in used:
        value = found(trt, use)
        if use.assigned:
            assert isinstance(value, property), use.text
            assert value.fset is not None, f"{use.text} can only be read"
        if use.arguments is not None and (numbers := numbers_of_arguments(value)):
            assert any(use.arguments in allowed for allowed in numbers), f"{use.text}: {use.arguments} arguments"
            checked.add(use.text)
    assert {"_context.set_input_shape", "_context.set_device_memory", "engine.create_execution_context"} <= checked


def test_every_overload_is_understood() -> None:
    trt = bindings(TENSORRT_RTX)
    assert numbers_of_arguments(trt.IExecutionContext.set_input_shape) == [range(2, 3)] * 3
    assert numbers_of_arguments(trt.ICudaEngine.create_execution_context) == [range(2)] * 2
    assert numbers_of_arguments(trt.ICudaEngine.get_device_memory_size_for_profile_v2) == [range(1, 2)]


def test_a_typing_error_would_be_found() -> None:
    trt = bindings(TENSORRT_RTX)
    with pytest.raises(AssertionError, match=r"has no _context\.execute_async_v4"):
        found(trt, Use("_context", ("execute_async_v4",)))
    assert 1 not in numbers_of_arguments(trt.IExecutionContext.set_device_memory)[0]


def test_values_chosen_by_name_exist() -> None:
    trt = bindings(TENSORRT_RTX)
    for name in get_args(Specialization):
        assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, name)
    assert set(_TORCH_TYPES) <= set(trt.DataType.__members__)


@pytest.mark.parametrize(
    ("simulated", "real"),
    [
        (SimulatedEngine, "ICudaEngine"),
        (SimulatedContext, "IExecutionContext"),
        (SimulatedConfig, "IRuntimeConfig"),
        (SimulatedRuntimeCache, "IRuntimeCache"),
    ],
)
def test_the_pretended_objects_offer_nothing_that_real_ones_lack(simulated: type, real: str) -> None:
    trt = bindings(TENSORRT_RTX)
    offered = {name for name in vars(simulated) if not name.startswith("_") and callable(getattr(simulated, name))}
    assert offered
    assert {name for name in offered if not hasattr(getattr(trt, real), name)} == set()


def test_what_the_real_runtime_says_without_a_gpu(tmp_path: Path) -> None:
    """What is no plan is refused by its header, in one clear error."""
    import torch

    from spike_export.artifacts.errors import EngineError
    from spike_export.engines.plan.build_profiles import Profile, ShapeRange
    from spike_export.engines.plan.safety import CheckedPlan
    from spike_export.engines.tensorrt.buffers import Buffers
    from spike_export.engines.tensorrt.engines import LoadedPlans, RuntimeOptions
    from tests.support.trt_simulation import SimulatedDevice, sidecar

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    bindings(TENSORRT_RTX)
    path = tmp_path / "engine.plan"
    path.write_bytes(b"no plan at all" * 100)
    shapes = {"input_ids": ShapeRange((1, 1), (1, 1), (1, 1))}
    plan = CheckedPlan(path, sidecar("tensorrt-rtx", [Profile("prefill", shapes), Profile("decode", shapes)], 0, 8))
    device = SimulatedDevice()
    with pytest.raises(EngineError, match=r"engine\.plan cannot run here, says TensorRT-RTX .*: malformed engine"):
        LoadedPlans([plan], RuntimeOptions(), device, Buffers(device))
