"""The number of threads: what the environment says, what a machine can run, and that torch follows."""

import os
from collections.abc import Iterator

import pytest
import torch

from spike_export.artifacts.errors import EngineError
from spike_export.artifacts.process.threads import VARIABLE, allow_threads, allowed_threads, require_threads, workers

PROCESSORS = os.cpu_count() or 1


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("value", "threads"),
    [
        (None, None),
        ("", None),
        ("3", 3),
        (" 3 ", 3),
        ("4,2", 4),  # OpenMP: one number a nesting level
        ("0", None),  # OpenMP ignores what is no positive number
        ("-2", None),
        ("many", None),
    ],
)
def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch, value: str | None, threads: int | None) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert allowed_threads() == threads


@pytest.mark.parametrize("threads", [-1, 0, PROCESSORS + 1, 100_000])
def test_what_the_machine_cannot_run_at_once_is_refused(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(EngineError, match=f"^{threads} threads: this machine has {PROCESSORS} processors; give"):
        allow_threads(threads)
    assert allowed_threads() == 1


@pytest.mark.parametrize("threads", [1, PROCESSORS])
def test_torch_and_later_processes_follow(monkeypatch: pytest.MonkeyPatch, torch_as_before: None, threads: int) -> None:
    monkeypatch.setenv(VARIABLE, "7")
    require_threads(threads)
    allow_threads(threads)
    assert os.environ[VARIABLE] == str(threads)
    assert torch.get_num_threads() == threads


def test_tasks_are_shared_among_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert workers(1) == 1
    assert workers(1000) == PROCESSORS
    monkeypatch.setenv(VARIABLE, "1")
    assert workers(4) == 1
