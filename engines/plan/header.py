"""The first bytes of a plan: which compiler wrote it, and for what. They are read without loading anything.

TensorRT's own tool (`trtexec --getPlanVersionOnly`) finds the version in bytes 24 to 27 behind the tag `ftrt` and a
serialization version of 0. TensorRT-RTX writes `vtrt` and the same places; its header of 64 bytes also holds the
plan's size (8 bytes from 16 on) and a bit per target (4 bytes from 32 on), as plans of 1.7.1 show.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.files.documents import require_file
from spike_export.engines.plan.backend import TENSORRT, TENSORRT_RTX, Backend

HEADER_SIZE = 64

TENSORRT_RTX_TAG = b"vtrt"
"""Beginning of a plan of TensorRT-RTX."""

VERSION = slice(24, 28)
"""Where a plan holds the version of its compiler, one byte for each of the four numbers."""

_BACKENDS: Mapping[bytes, Backend] = {b"ftrt": TENSORRT, TENSORRT_RTX_TAG: TENSORRT_RTX}


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """What a plan says of itself.

    Attributes:
        version: Of the backend, four numbers.
        size: Bytes of the whole plan; None where the header does not tell.
        targets: Compute capabilities such as `SM86`; empty where the header does not tell.
    """

    backend: Backend
    version: str
    size: int | None
    targets: tuple[str, ...]

    @property
    def title(self) -> str:
        """Return backend, version and targets in words."""
        targets = f" for {', '.join(self.targets)}" if self.targets else ""
        return f"{self.backend.title} {self.version}{targets}"


def read_header(plan: Path) -> PlanHeader:
    """Read the header of a plan.

    Raises:
        EngineError: The file cannot be read, or is no plan of either backend.
    """
    try:
        require_file(plan)
        with plan.open("rb") as file:
            data = file.read(HEADER_SIZE)
    except OSError as error:
        raise EngineError(f"{plan}: cannot read the plan: {error.strerror}") from error
    backend = _BACKENDS.get(data[:4])
    if backend is None or len(data) < VERSION.stop or data[4:8] != bytes(4):
        start = f"it begins with {data[:8].hex(' ')}" if data else "it is empty"
        raise EngineError(f"{plan}: not a TensorRT or TensorRT-RTX plan ({start}); give a plan that build wrote")
    version = ".".join(str(number) for number in data[VERSION])
    if backend is TENSORRT or len(data) < HEADER_SIZE:
        return PlanHeader(backend, version, None, ())
    (size,) = struct.unpack_from("<Q", data, 16)
    (bits,) = struct.unpack_from("<I", data, 32)
    return PlanHeader(backend, version, size, _targets(bits))


def _targets(bits: int) -> tuple[str, ...]:
    # In the order of trt.ComputeCapability; a plan for no target in particular has bits beyond, for GPUs to come.
    return tuple(target for place, target in enumerate(TENSORRT_RTX.targets) if bits >> place & 1)
