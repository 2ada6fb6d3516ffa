"""The log that TensorRT writes errors and warnings to.

Their base classes belong to whichever of the two bindings is in use, so each is made by a function that gets the
bindings. TensorRT keeps no reference to them: the caller must, for as long as the build runs. None may raise, since
the exception would cross C++.
"""

from dataclasses import dataclass, field
from typing import Any

_NOISE = "has Int64 binding"
"""Said of every int64 input of every graph."""


@dataclass
class BuildLog:
    """TensorRT's complaints, kept for the caller instead of being printed."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """Return the first error on one line, of which later ones mostly follow; who asks clears them."""
        return " ".join(self.errors[0].split()) if self.errors else "it gives no reason"


def make_logger(trt: Any, log: BuildLog) -> Any:
    """Return a `trt.ILogger` that collects errors and warnings in `log`."""
    kept = {
        trt.ILogger.INTERNAL_ERROR: log.errors,
        trt.ILogger.ERROR: log.errors,
        trt.ILogger.WARNING: log.warnings,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base is untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in kept and _NOISE not in message:
                kept[severity].append(message)

    return Logger()
