"""The benchmark of waiting threads: what it reads, what it compares, and that its load is a load."""

import os
from pathlib import Path

import pytest

from benchmarks.stages import shared_machine
from benchmarks.stages.shared_machine import POLICIES, Times, busy, seconds_of, stage_seconds, table
from tests.support.tiny.cli_models import write_corpus, write_model

SPINNING, CHOSEN, AT_ONCE = POLICIES


@pytest.mark.parametrize(
    ("line", "seconds"), [("[1/1] spikes: done in 38.1 s", 38.1), ("[1/1] spikes: done in 2 min 05 s", 125)]
)
def test_the_commands_own_log_tells_the_time(line: str, seconds: float) -> None:
    assert seconds_of(f"[1/1] spikes: started\n{line}\nstatistics of shard 1/1: x\n") == seconds


def test_a_log_without_the_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not say"):
        seconds_of("[1/1] spikes: started\n")


@pytest.mark.parametrize(
    ("quiet", "loaded", "verdicts"), [(10.3, 10.0, ("met", "met")), (10.4, 10.1, ("missed", "missed"))]
)
def test_the_targets_are_of_medians(quiet: float, loaded: float, verdicts: tuple[str, str]) -> None:
    times = Times(
        {SPINNING: [9, 10, 90], CHOSEN: [1, quiet, 99], AT_ONCE: [1, 1, 1]},
        {SPINNING: [20, 20, 20], CHOSEN: [loaded, 1, 99], AT_ONCE: [1, 1, 1]},
    )
    *_, first, second = table(times).splitlines()
    assert (first.split()[-1], second.split()[-1]) == verdicts


def test_policies_take_turns_and_only_half_the_runs_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[bool, str]] = []
    loaded: list[int] = []

    class Busy:
        def __init__(self, processor: int) -> None:
            self.processor = processor

        def __enter__(self) -> None:
            loaded.append(self.processor)

        def __exit__(self, *_: object) -> None:
            loaded.pop()

    def run(model: str, given: object, policy: dict[str, str]) -> float:
        runs.append((bool(loaded), next(name for name in POLICIES if POLICIES[name] is policy)))
        return float(len(runs))

    monkeypatch.setattr(shared_machine, "busy", Busy)
    monkeypatch.setattr(shared_machine, "stage_seconds", run)
    times = shared_machine.measure("model", shared_machine._arguments(["model", "--rounds", "2"]))
    first, second = [(False, name) for name in POLICIES], [(True, name) for name in POLICIES]
    assert runs == [*first, *second, *first[::-1], *second[::-1]]
    assert times == Times(
        {SPINNING: [1, 9], CHOSEN: [2, 8], AT_ONCE: [3, 7]}, {SPINNING: [4, 12], CHOSEN: [5, 11], AT_ONCE: [6, 10]}
    )


def test_the_loop_takes_its_processor() -> None:
    children = os.times().children_user
    with busy(min(os.sched_getaffinity(0))):
        sum(range(3_000_000))
    assert os.times().children_user > children


def test_a_run_is_the_real_command(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus.txt")
    given = shared_machine._arguments(["model", "--corpus", str(corpus), "--samples", "1", "--length", "16"])
    assert stage_seconds(str(tmp_path / "model"), given, POLICIES[CHOSEN]) > 0
