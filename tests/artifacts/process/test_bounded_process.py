import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.errors import CorpusError
from spike_export.artifacts.process.bounded_process import BoundedProcess, Budget, BudgetError, within_budget

SHORT = Budget(seconds=1, memory=64 << 20)
# Pages of a large parent are copied as the child first writes them, which takes seconds of a slow processor.
SMALL = Budget(seconds=60, memory=64 << 20)


def for_ever() -> None:
    while True:
        pass


def refused() -> None:
    raise CorpusError("no such text")


def test_the_answer_is_the_functions() -> None:
    assert within_budget(lambda: [1, "a"]) == [1, "a"]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: "a" * 10**10, "took more than 64 MiB of memory"),
        # More than a long test run can have freed and still hold.
        (lambda: [bytes(1 << 20) for _ in range(8_000)], "took more than 64 MiB of memory"),
        (os.abort, r"failed in native code \(SIGABRT\)"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    ],
)
def test_more_than_the_budget_is_an_error(work: Callable[[], Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        within_budget(work, SMALL)


def test_what_the_function_raises_is_raised_here() -> None:
    with pytest.raises(CorpusError, match="no such text"):
        within_budget(refused)


def test_a_process_answers_again_also_after_one_that_was_ended() -> None:
    with BoundedProcess(lambda stop: for_ever() if stop else os.getpid(), SHORT) as process:
        first = process.ask(False)
        assert process.ask(False) == first != os.getpid()
        with pytest.raises(BudgetError, match=r"took more than \d+ s"):
            process.ask(True)
        assert process.ask(False) not in (first, os.getpid())


def test_time_counts_for_each_request() -> None:
    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    with BoundedProcess(work, SHORT) as process:
        for _ in range(3):
            process.ask(0.8)


def test_nothing_stays_behind_and_nothing_is_taken_along(tmp_path: Path) -> None:
    def held(_: None) -> set[str]:
        return {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}  # noqa: PTH208

    with (tmp_path / "open").open("w") as file, BoundedProcess(held) as process:
        assert file.name not in process.ask(None)
        child = process._child
        assert child is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child._pid, 0)


def test_what_the_function_prints_does_not_appear(capfd: pytest.CaptureFixture[str]) -> None:
    within_budget(lambda: os.write(2, b"panicked at"))
    assert capfd.readouterr() == ("", "")
