"""Objects that TensorRT calls back during a build: its progress, and the plan as it is written.

Their base classes belong to whichever of the two bindings is in use, so each is made by a function that gets the
bindings. TensorRT keeps no reference to them: the caller must, for as long as the build runs. None may raise, since
the exception would cross C++.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from spike_export.engines.build.progress import BuildProgress


def make_monitor(trt: Any, report: Callable[[int], None], cancelled: Callable[[], bool]) -> Any:
    """Return a `trt.IProgressMonitor`.

    Args:
        report: Called with each new percentage.
        cancelled: Asked after each step; the build stops when it says yes.
    """
    progress = BuildProgress()
    last = -1

    def tell() -> None:
        nonlocal last
        if progress.percent > last:
            last = progress.percent
            report(last)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)
            tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(phase_name, step)
            tell()
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)
            tell()

    return Monitor()


@dataclass
class PlanStream:
    """The plan on its way to its file: counted and hashed as it passes."""

    file: IO[bytes]
    size: int = 0
    failure: OSError | None = None
    _digest: Any = field(default_factory=hashlib.sha256)

    @property
    def sha256(self) -> str:
        """Return the hex digest of what was written."""
        return str(self._digest.hexdigest())

    def write(self, data: bytes) -> int:
        """Write all of `data`; return 0 and keep the failure when that is not possible."""
        try:
            self.file.write(data)
        except OSError as error:
            self.failure = error
            return 0
        self._digest.update(data)
        self.size += len(data)
        return len(data)


def make_writer(trt: Any, stream: PlanStream) -> Any:
    """Return a `trt.IStreamWriter` into `stream`."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the base is untyped
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return stream.write(data)

    return Writer()
