"""The build process: `python -m spike_export.engines.build.process`.

Reads one `BuildRequest` line from stdin and writes event lines to stdout. Stdin is then the caller's lifeline: when
it closes, because the caller cancels or has died, the build stops.
"""

import importlib
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from spike_export.artifacts.errors import EngineError, SpikeExportError, one_line
from spike_export.engines.audit.reader import read_built_plan
from spike_export.engines.audit.verdict import covering, judge
from spike_export.engines.build.callbacks import PlanStream
from spike_export.engines.build.compiler import BuildCancelledError, CompileSettings, Watch, compile_plan
from spike_export.engines.build.request import BuildRequest, CompletionEvent, FailureEvent, FaultEvent, ProgressEvent
from spike_export.engines.plan.backend import BACKENDS
from spike_export.engines.plan.build_options import BatchRange
from spike_export.engines.plan.build_profiles import Limits, Profile, make_profiles
from spike_export.engines.plan.graph import graph_inputs, load_graph, planned_precisions, resize_cache
from spike_export.engines.plan.sidecar import InputShapes, ProfileShapes

_GRACE = 1.0
"""Seconds a cancelled build has to reach its next step; TensorRT asks rarely during code generation."""

_CANCELLED = 130
"""Exit code of a cancelled build, as shells use it after Ctrl-C."""


def main() -> int:
    """Serve one request; return the exit code."""
    events = _claim_stdout()
    request = BuildRequest.model_validate_json(sys.stdin.readline())
    cancelled = threading.Event()
    threading.Thread(target=_watch_caller, args=(cancelled,), daemon=True).start()
    try:
        _send(events, build(request, events, cancelled))
    except BuildCancelledError:
        return _CANCELLED
    except SpikeExportError as error:
        _send(events, FailureEvent(message=str(error)))
    except OSError as error:
        _send(events, FailureEvent(message=str(error), errno=error.errno))
    except Exception as error:  # the caller reports it as a fault of its own
        message = f"{type(error).__name__}: {one_line(error)}"
        _send(events, FaultEvent(message=message, traceback=traceback.format_exc()))
    return 0


def build(request: BuildRequest, events: IO[bytes], cancelled: threading.Event) -> CompletionEvent:
    """Build and audit one plan.

    Raises:
        EngineError: The backend cannot be loaded, or refuses the graph.
        ArtifactError: The timing cache cannot be written.
        BuildCancelledError: The caller asked for it.
        OSError: The plan cannot be written.
    """
    backend = BACKENDS[request.backend]
    try:
        trt = importlib.import_module(backend.module)
    except (ImportError, OSError) as error:
        raise EngineError(f"{backend.title} cannot be loaded ({error}); run: {backend.install}") from error
    started = time.monotonic()
    graph = load_graph(Path(request.graph))
    if request.slots is not None:
        resize_cache(graph, request.slots)
    profiles = make_profiles(graph_inputs(graph), request.profiles, _limits(request))
    cache = Path(request.timing_cache) if request.timing_cache else None
    settings = CompileSettings(
        backend,
        request.targets,
        profiles,
        request.optimization_level,
        request.features,
        request.hardware_compatible,
        cache,
    )

    only = f"{request.profiles[0]} " if len(request.profiles) == 1 else ""
    what = f"percent of the {only}plan built"

    def report(percent: int) -> None:
        if not cancelled.is_set():
            _send(events, ProgressEvent(what=what, done=percent, total=100))

    with Path(request.plan).open("wb") as file:
        stream = PlanStream(file)
        log = compile_plan(trt, Path(request.graph), graph, settings, stream, Watch(report, cancelled.is_set))
    seconds = time.monotonic() - started
    reading = covering(read_built_plan(Path(request.plan), trt, backend), len(profiles))
    return CompletionEvent(
        version=trt.__version__,
        profiles=tuple(_describe(profile) for profile in profiles),
        plan_sha256=stream.sha256,
        plan_size=stream.size,
        seconds=round(seconds, 3),
        peak_memory=peak_memory(),
        warnings=tuple(dict.fromkeys(log.warnings)),
        audit=judge(reading, planned_precisions(graph)),
    )


def peak_memory(status: Path = Path("/proc/self/status")) -> int:
    """Return the largest resident set so far, in bytes; 0 where the system does not say.

    Not `getrusage`: its figure is inherited from the process that started this one.
    """
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _claim_stdout() -> IO[bytes]:
    """Keep stdout for events: native code that prints to descriptor 1 goes to stderr instead."""
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return events


def _send(events: IO[bytes], event: BaseModel) -> None:
    try:
        events.write(event.model_dump_json().encode() + b"\n")
    except BrokenPipeError:
        # The caller is gone; the closing of stdin says so too, and that is where it is handled.
        return


def _watch_caller(cancelled: threading.Event) -> None:
    # Not through `sys.stdin`: Python would wait a second at its end for the lock of a file that a thread still reads.
    while os.read(0, 4096):
        pass
    cancelled.set()
    time.sleep(_GRACE)
    os._exit(_CANCELLED)


def _limits(request: BuildRequest) -> Limits:
    return Limits(
        BatchRange(*request.batch),
        request.context,
        request.typical_prompt,
        request.max_prompt,
        request.prefix,
        request.slots,
    )


def _describe(profile: Profile) -> ProfileShapes:
    return ProfileShapes(
        name=profile.name,
        inputs={
            name: InputShapes(min=shapes.smallest, opt=shapes.typical, max=shapes.largest)
            for name, shapes in profile.shapes.items()
        },
    )


if __name__ == "__main__":
    sys.exit(main())
