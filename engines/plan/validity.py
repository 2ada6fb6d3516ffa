"""What TensorRT-RTX itself says of a plan's header, before it deserializes the plan.

It knows what a sidecar cannot: whether the driver is too old, or the GPU's memory too small.
"""

from pathlib import Path
from typing import Any

from spike_export.artifacts.errors import EngineError
from spike_export.engines.plan.header import HEADER_SIZE


def require_valid_header(trt: Any, runtime: Any, plan: Path) -> None:
    """Refuse a plan of which the runtime says that it cannot run; TensorRT cannot be asked, and refuses at loading.

    A plan that runs slower than one built for this very GPU is taken.

    Args:
        trt: The bindings.
        runtime: A `trt.Runtime` on the GPU the plan is to run on.

    Raises:
        EngineError: The plan cannot run here; with every reason the runtime gives.
        OSError: The plan cannot be read.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    with plan.open("rb") as file:
        header = file.read(HEADER_SIZE)
    validity, diagnostics = runtime.get_engine_validity(header)
    if validity in (trt.EngineValidity.VALID, trt.EngineValidity.SUBOPTIMAL):
        return
    raise EngineError(f"{plan} cannot run here, says TensorRT-RTX {trt.__version__}: {_reasons(trt, int(diagnostics))}")


def _reasons(trt: Any, diagnostics: int) -> str:
    members = trt.EngineInvalidityDiagnostics.__members__
    named = [name.replace("_", " ").lower() for name, bit in members.items() if int(bit) & diagnostics]
    return ", ".join(named) or "no reason given; is the CUDA driver in order?"
