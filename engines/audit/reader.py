"""A plan of either compiler, read the way this machine can."""

import importlib
from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import EngineError
from spike_export.engines.audit.engine_inspector import inspect_engine
from spike_export.engines.audit.program_products import read_program_text
from spike_export.engines.audit.reading import Evidence, PlanReading
from spike_export.engines.plan.backend import TENSORRT_RTX, Backend, Machine
from spike_export.engines.plan.header import read_header
from spike_export.engines.plan.safety import require_own_plan


def read_plan(plan: Path, machine: Machine, *, trusted: bool = False) -> PlanReading:
    """Read what a plan runs: from its program text, or, where TensorRT wrote it, on a GPU from the engine inspector.

    The inspector loads the engine, which executes it.

    Args:
        trusted: Let the inspector load a plan that was not built here, too.

    Returns:
        The reading; without programs, and with the reason, where neither way leads anywhere.

    Raises:
        EngineError: The file cannot be read, is no plan, or cannot be loaded by the compiler's runtime; or it would
            have to be loaded, and is a foreign one.
    """
    backend = read_header(plan).backend
    reading = read_program_text(plan)
    if reading.programs or backend is TENSORRT_RTX:
        return reading
    if machine.gpu is None:
        return _unread(reading, "the engine inspector needs an NVIDIA GPU, and none was found")
    if backend.name not in machine.installed:
        return _unread(reading, f"the engine inspector needs {backend.title}; run: {backend.install}")
    if not trusted:
        _require_trust(plan)
    try:
        trt = importlib.import_module(backend.module)
    except (ImportError, OSError) as error:
        raise EngineError(f"{backend.title} cannot be loaded ({error}); run: {backend.install}") from error
    return inspect_engine(trt, plan)


def _require_trust(plan: Path) -> None:
    try:
        require_own_plan(plan)
    except EngineError as error:
        raise EngineError(
            f"{error}. To inspect a plan of TensorRT is to load it: give --trust-plan if you know who built it"
        ) from error


def read_built_plan(plan: Path, trt: Any, backend: Backend) -> PlanReading:
    """Read a plan that has just been built, with the bindings that built it.

    What the inspector cannot tell is the reading's caveat and no error: the plan is there, after perhaps an hour.

    Raises:
        EngineError: The file cannot be read.
    """
    reading = read_program_text(plan)
    if reading.programs or not backend.needs_gpu:
        return reading
    try:
        return inspect_engine(trt, plan)
    except EngineError as error:
        return PlanReading(Evidence("none", f"{backend.title} {trt.__version__}", str(error)))


def _unread(reading: PlanReading, reason: str) -> PlanReading:
    evidence = reading.evidence
    return PlanReading(Evidence("none", evidence.compiler, f"{evidence.caveat}, and {reason}"))
