"""Runs the build process: its events, its cancellation, its death."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.progress import Progress
from spike_export.engines.build.request import BuildRequest, CompletionEvent, FailureEvent, FaultEvent, ProgressEvent

BUILD_COMMAND = (sys.executable, "-P", "-m", "spike_export.engines.build.process")
"""-P: a file in the working directory must not stand in for a module."""

_PATIENCE = 3.0
"""Seconds a cancelled process gets before it is killed."""

_LAST_WORDS = 400
"""Characters of a dead process's output that are shown."""


class BuildFaultError(Exception):
    """A fault of the program in the build process; its traceback is a note of this exception."""


def run_build(request: BuildRequest, progress: Progress, command: Sequence[str] = BUILD_COMMAND) -> CompletionEvent:
    """Build in a process of its own, so that neither its memory nor a crash of native code is the caller's.

    The process is gone when this returns or raises, KeyboardInterrupt included.

    Args:
        command: Program that speaks the protocol of `process`.

    Raises:
        EngineError: The build failed, or the process died; the signal or its last words are named.
        OSError: The plan cannot be written.
        BuildFaultError: A fault of the program, in the build process.
    """
    with tempfile.TemporaryFile() as output:
        # A session of its own: Ctrl-C on the terminal reaches only the caller, which then cancels in order.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, start_new_session=True
        )
        try:
            completion = _follow(process, request, progress)
            code = process.wait()
        finally:
            _stop(process)
        if completion is None:
            raise EngineError(_describe_death(code, output, len(request.profiles)))
        return completion


def _follow(process: "subprocess.Popen[bytes]", request: BuildRequest, progress: Progress) -> CompletionEvent | None:
    """Relay progress until the process is done; return None when it ended without a verdict."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request.model_dump_json().encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    completion: CompletionEvent | None = None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "progress":
            step = ProgressEvent.model_validate(event)
            progress(step.what, step.done, step.total)
        elif event["event"] == "failure":
            _raise(FailureEvent.model_validate(event))
        elif event["event"] == "fault":
            _raise_fault(FaultEvent.model_validate(event))
        else:
            completion = CompletionEvent.model_validate_json(line)
    return completion


def _raise(failure: FailureEvent) -> None:
    if failure.errno is not None:
        raise OSError(failure.errno, failure.message)
    raise EngineError(failure.message)


def _raise_fault(fault: FaultEvent) -> None:
    error = BuildFaultError(fault.message)
    error.add_note(f"In the build process:\n{fault.traceback}")
    raise error


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process if it still runs: ask it by closing its input, then kill it."""
    try:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait(_PATIENCE)
    except (subprocess.TimeoutExpired, BrokenPipeError):
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _describe_death(code: int, output: IO[bytes], profiles: int) -> str:
    output.seek(0)
    words = " ".join(output.read().decode(errors="replace").split())[-_LAST_WORDS:]
    said = f"; it said last: {words}" if words else ""
    if code >= 0:
        return f"the build process ended with exit code {code} and no result{said}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        split = "build the profiles one by one (--profiles split), " if profiles > 1 else ""
        return (
            f"the build process was killed ({name}), most likely because memory ran out; {split}free memory, or use a "
            f"larger machine{said}"
        )
    return f"the build process crashed inside TensorRT ({name}); please report the model and this message{said}"
