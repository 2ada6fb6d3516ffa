"""`python -m tests.support.forked_command`: command lines in processes forked from one that has the libraries.

For tests that kill a command or interrupt it again and again: each process would import for seconds what one can.
Reads lines of JSON: files for standard output and standard error, and the arguments. Answers each with the id of the
process, and with its exit code when it has ended.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from spike_export.cli.main import run
from spike_export.cli.waiting import wait_asleep
from tests.support.tiny.cli_models import Outcome


class ForkedCommands:
    """Starts command lines, one at a time."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self._server = server
        self._streams = folder / "out", folder / "err"

    def start(self, arguments: Sequence[str]) -> int:
        """Start a command line; return the id of its process."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps([*map(str, self._streams), list(arguments)]) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def end(self) -> Outcome:
        """Wait for the end of the command line; a signal that ended it is a negative code."""
        return Outcome(self._answer(), *(stream.read_text(encoding="utf-8") for stream in self._streams))

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


@contextmanager
def forked_commands(folder: Path) -> Iterator[ForkedCommands]:
    """Within the block, a process that forks; `folder` is an empty one, for the commands' streams."""
    command = [sys.executable, "-m", "tests.support.forked_command"]
    environment = dict(os.environ)
    wait_asleep(environment)  # as the command does before it imports torch
    options: Any = {"cwd": Path(__file__).parents[2], "env": environment, "text": True}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as server:
        try:
            yield ForkedCommands(server, folder)
        finally:
            server.kill()


def run_and_exit(arguments: Sequence[str], out: int, err: int) -> NoReturn:
    """Be the command line in a forked process, with its streams into two descriptors."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run(list(arguments))
        sys.stdout.flush()
    finally:
        os._exit(code)


def import_libraries() -> None:
    """Import what a forked command line needs."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    import spike_export.cli.terminal.progress_display
    import spike_export.pipeline.run_job
    import spike_export.report.page  # noqa: F401


def _serve() -> None:
    import_libraries()
    for line in sys.stdin:
        *streams, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            run_and_exit(arguments, *(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in streams))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
