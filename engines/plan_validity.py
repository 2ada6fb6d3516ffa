"""What TensorRT-RTX itself says of a plan's header, before it deserializes the plan.

It knows what a sidecar cannot: whether the driver is too old, or the GPU's memory too small.
"""

from pathlib import Path
from typing import Any

from spike_export.calibration.errors import EngineError
from spike_export.engines.plan_header import HEADER_SIZE


def require_valid_header(trt: Any, runtime: Any, plan: Path) -> str | None:
    """Ask the runtime about a plan.

    Args:
        trt: The bindings.
        runtime: A `trt.Runtime` on the GPU the plan is to run on.

    Returns:
        A warning, or None. None also where the backend cannot be asked: TensorRT cannot.

    Raises:
        EngineError: The plan cannot run here; with every reason the runtime gives.
        OSError: The plan cannot be read.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return None
    with plan.open("rb") as file:
        header = file.read(HEADER_SIZE)
    validity, diagnostics = runtime.get_engine_validity(header)
    if validity == trt.EngineValidity.VALID:
        return None
    reasons = _reasons(trt, int(diagnostics))
    if validity == trt.EngineValidity.SUBOPTIMAL:
        return f"{plan} runs here, but slower than it could ({reasons}); build it again for this GPU"
    raise EngineError(f"{plan} cannot run here, says TensorRT-RTX {trt.__version__}: {reasons}")


def _reasons(trt: Any, diagnostics: int) -> str:
    members = trt.EngineInvalidityDiagnostics.__members__
    named = [name.replace("_", " ").lower() for name, bit in members.items() if int(bit) & diagnostics]
    return ", ".join(named) or "no reason given; is the CUDA driver in order?"
