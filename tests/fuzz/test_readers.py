"""Whatever a file holds, its reader returns a value or refuses the file in one line, in bounded time and memory.

`make fuzz` goes on for FUZZ_SECONDS; inputs that failed are kept in `.fuzz` and tried first the next time.
"""

import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from spike_export.artifacts.errors import SpikeExportError
from tests.fuzz.formats import FORMATS, Files, Format
from tests.fuzz.tally import Tally

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""For all formats and whole commands together; 0 for the short run."""

OF_COMMANDS = SECONDS / 4
"""What of this time `test_commands.py` takes."""

KEPT = Path(".fuzz")
"""Where inputs that failed are kept."""

PATIENCE = 15
"""Seconds of processor time for one input."""

MEMORY = 2 << 30
"""Bytes that the readers of one format may take in addition."""


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_value_or_one_line(form: Format, record_property: Any) -> None:
    tally = Tally(form.name)
    try:
        with limited_memory(MEMORY):
            explore(form, tally)
    finally:
        record_property("fuzzed", tally.row)


def explore(form: Format, tally: Tally) -> None:
    @settings(
        max_examples=form.examples,
        deadline=None,
        derandomize=not SECONDS,
        database=DirectoryBasedExampleDatabase(KEPT / form.name.replace(" ", "-")) if SECONDS else None,
        suppress_health_check=list(HealthCheck),
    )
    @given(form.files())
    def one(files: Files) -> None:
        try_one(form, files, tally)

    end = time.monotonic() + (SECONDS - OF_COMMANDS) / len(FORMATS)
    one()
    while time.monotonic() < end:
        one()


def try_one(form: Format, files: Files, tally: Tally) -> None:
    """Write the files, read them, and count the outcome; anything but a value and one line fails."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        tally.failed += 1
        with limited_time(PATIENCE):
            try:
                form.read(Path(name))
            except SpikeExportError as error:
                assert_one_line(str(error))
                tally.refused += 1
            else:
                tally.accepted += 1
        tally.failed -= 1


def assert_one_line(message: str) -> None:
    assert message
    assert len(message.splitlines()) == 1, message


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Let this process grow by so many bytes only while the block runs."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Overrun(BaseException):
    """Input that takes too long. No Exception, lest a reader takes it for a fault of the input."""


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Fail a block that takes more processor time."""

    def stop(signal_number: int, frame: object) -> None:
        raise Overrun(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
