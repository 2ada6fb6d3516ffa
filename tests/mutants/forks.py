"""Runs the tests of each mutant in a fork of a process that has imported the libraries already."""

import importlib.abc
import importlib.util
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from tests.mutants.mutant import Mutant

_OURS = ("spike_export", "tests", "benchmarks")
_KEPT = "tests.mutants"

_ADDRESS_SPACE = 16 << 30
"""Bytes that a mutant may map."""

KILLED, SURVIVED, TIMED_OUT, UNTESTED = "killed", "survived", "timed out", "untested"
_OUTCOMES = {0: SURVIVED, 5: UNTESTED}
"""pytest's exit codes; with any other one a test failed, or the mutant could not be imported."""


@dataclass(frozen=True)
class Trial:
    """A mutant (None: the file as it is), its tests, and the seconds they may take."""

    mutant: Mutant | None
    tests: Sequence[str]
    seconds: float


def warm(tests: Sequence[str]) -> None:
    """Import what the tests import, and forget the project's own modules again: a fork imports them with its mutant."""
    with _silence():
        pytest.main([*tests, "--collect-only", "-q", "-p", "no:cacheprovider"])
    for name in list(sys.modules):
        if name.partition(".")[0] in _OURS and name != "tests" and not name.startswith(_KEPT):
            del sys.modules[name]


def outcomes(root: Path, trials: Iterator[Trial], processes: int) -> Iterator[tuple[Trial, str]]:
    """Run trials, so many at a time, and yield each with its outcome when it has ended."""
    running: dict[int, tuple[Trial, float, Path]] = {}
    while True:
        while len(running) < processes and (trial := next(trials, None)) is not None:
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            running[_forked(root, trial, folder)] = (trial, time.monotonic() + trial.seconds, folder)
        if not running:
            return
        for process, (trial, deadline, folder) in list(running.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended or time.monotonic() > deadline:
                yield trial, _ended(process, status) if ended else _stopped(process)
                shutil.rmtree(folder, ignore_errors=True)
                del running[process]
        time.sleep(0.02)


def _ended(process: int, status: int) -> str:
    return _OUTCOMES.get(os.waitstatus_to_exitcode(status), KILLED)


def _stopped(process: int) -> str:
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return TIMED_OUT


def _forked(root: Path, trial: Trial, folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 3
    try:
        os.setsid()
        with _silence():
            code = _run(root, trial, folder)
    finally:
        os._exit(code)


def _run(root: Path, trial: Trial, folder: Path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, resource.RLIM_INFINITY))
    # A failure is enough: its smallest example takes longer than all tests.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", deadline=None, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    if trial.mutant is not None:
        sys.meta_path.insert(0, _Mutated(trial.mutant, root))
    options = ("-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", f"--basetemp={folder}")
    return int(pytest.main([*trial.tests, *options]))


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a mutant in the place of its file."""

    def __init__(self, mutant: Mutant, root: Path) -> None:
        self._mutant, self._path = mutant, str(root / mutant.file)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=self._path)

    def get_source(self, fullname: str) -> str:
        return self._mutant.source

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self._path
        exec(compile(self._mutant.source, self._path, "exec"), module.__dict__)


@contextmanager
def _silence() -> Iterator[None]:
    """Send what is printed to nowhere, also what libraries print."""
    kept, nowhere = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        os.close(nowhere)
