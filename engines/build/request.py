"""What passes between the caller and the build process, as JSON lines."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from spike_export.engines.audit.verdict import PlanAudit
from spike_export.engines.plan.backend import PlanFeature
from spike_export.engines.plan.build_options import HardwareCompatibility, ProfileName
from spike_export.engines.plan.sidecar import ProfileShapes


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BuildRequest(_Message):
    """One build, everything decided.

    Attributes:
        backend: Key of `BACKENDS`.
        graph: Path of model.onnx; its weights lie beside it.
        plan: Path to write to; an existing file is overwritten.
        targets: Compute capabilities; empty where the backend cannot be asked.
        batch: Smallest, typical, largest.
        context, typical_prompt, max_prompt, prefix, slots: Tokens, as in `build_profiles.Limits`.
        features: What the plan can do beyond running; see `BuildOptions`.
        timing_cache: Path, or None for none.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    graph: str
    plan: str
    targets: tuple[str, ...]
    profiles: tuple[ProfileName, ...]
    batch: tuple[int, int, int]
    context: int
    typical_prompt: int
    max_prompt: int
    prefix: int
    slots: int | None = None
    optimization_level: int
    features: frozenset[PlanFeature] = frozenset()
    hardware_compatible: HardwareCompatibility | None = None
    timing_cache: str | None = None


class ProgressEvent(_Message):
    """The build is `done` of `total` through `what`."""

    event: Literal["progress"] = "progress"
    what: str
    done: int
    total: int


class FailureEvent(_Message):
    """The build failed for a reason that is known; `errno` when the plan could not be written."""

    event: Literal["failure"] = "failure"
    message: str
    errno: int | None = None


class FaultEvent(_Message):
    """The build process met what no part of the program expected."""

    event: Literal["fault"] = "fault"
    message: str
    traceback: str


class CompletionEvent(_Message):
    """The plan is written.

    Attributes:
        version: Of the backend.
        plan_size: Bytes.
        peak_memory: Largest resident set of the build process, in bytes.
        warnings: TensorRT's, in order, without duplicates.
    """

    event: Literal["completion"] = "completion"
    version: str
    profiles: tuple[ProfileShapes, ...]
    plan_sha256: str
    plan_size: int
    seconds: float
    peak_memory: int
    warnings: tuple[str, ...]
    audit: PlanAudit
