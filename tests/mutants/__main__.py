"""`python -m tests.mutants`: change the core in one place at a time, and see whether a test notices.

Prints each mutant that no test noticed, and a table. The exit code is 1 where fewer than nine of ten were noticed;
mutants that accepted.toml has a reason for do not count. It is 1 also where an entry of accepted.toml names lines that
no longer exist.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.mutants.accepted import Accepted, load_accepted, stale
from tests.mutants.changes import changes_of, sample
from tests.mutants.covering_tests import CoveringTests
from tests.mutants.forks import KILLED, SURVIVED, TIMED_OUT, UNTESTED, Trial, outcomes, warm
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
LEAST = 0.9

TARGETS: Mapping[str, tuple[str, ...]] = {
    "calibration/methods": ("tests/calibration/methods",),
    "calibration/statistics": ("tests/calibration/statistics",),
    "export": ("tests/export",),
    "engines/generation": ("tests/engines/generation",),
    "pipeline/run_directory.py": ("tests/pipeline/test_run_directory.py",),
}
"""A folder or a file that is changed → the tests that are to notice."""

ACCEPTED = "accepted"


def main() -> int:
    """Try mutants of every target for as long as asked; return the exit code."""
    options = _options()
    outdated = stale(load_accepted(), ROOT)
    for entry in outdated:
        print(f"accepted.toml: {entry.file} has no line {entry.before!r} any more; remove the entry", flush=True)
    code = int(bool(outdated))
    for name in options.targets or TARGETS:
        counts = _tried(name, options)
        tried = sum(counts.values()) - counts[ACCEPTED]
        killed = counts[KILLED] + counts[TIMED_OUT]
        print(f"{name}: {sum(counts.values())} tried, {dict(counts)}: {killed / max(1, tried):.1%} noticed", flush=True)
        code |= killed < LEAST * tried
    return code


def _tried(name: str, options: argparse.Namespace) -> Counter[str]:
    """Try a sample of a target's mutants, print those that survive, and return how many had which outcome."""
    files, tests = _files(name), TARGETS[name]
    groups = [found for file in files if (found := changes_of(ROOT, file))]
    print(f"{name}: {sum(map(len, groups))} changes of {len(groups)} files", flush=True)
    covering = CoveringTests.kept(options.keep / f"{name.replace('/', '-')}.json", ROOT, files, tests)
    warm(tests)
    _require_passing(covering, options)
    counts: Counter[str] = Counter()
    chosen, accepted = sample(groups, options.count, options.seed), load_accepted()
    for trial, outcome in outcomes(ROOT, _trials(chosen, covering, options), options.processes):
        assert trial.mutant is not None
        missed = outcome in (SURVIVED, UNTESTED)
        excuse = next((entry for entry in accepted if missed and entry.is_of(trial.mutant)), None)
        counts[ACCEPTED if excuse else outcome] += 1
        if missed:
            print(_shown(trial.mutant, outcome, excuse), flush=True)
    return counts


def _files(name: str) -> list[str]:
    place = ROOT / name
    return [str(path.relative_to(ROOT)) for path in ([place] if place.is_file() else sorted(place.rglob("*.py")))]


def _trials(mutants: Iterator[Mutant], covering: CoveringTests, options: argparse.Namespace) -> Iterator[Trial]:
    end = time.monotonic() + options.seconds
    for mutant in mutants:
        if time.monotonic() > end:
            return
        tests = covering.of(mutant, options.test_seconds)
        yield Trial(mutant, tests, 30 + 5 * sum(covering.seconds[test] for test in tests))


def _require_passing(covering: CoveringTests, options: argparse.Namespace) -> None:
    """See that tests pass in a fork without any mutant; otherwise every mutant would be taken for noticed."""
    quick = sorted(covering.seconds, key=lambda name: covering.seconds[name])[:20]
    for _, outcome in outcomes(ROOT, iter([Trial(None, quick, 300)]), 1):
        if outcome != SURVIVED:
            raise SystemExit(f"tests fail in a fork of this process, without any mutant ({outcome})")


def _shown(mutant: Mutant, outcome: str, excuse: Accepted | None) -> str:
    changed = "\n".join(f"    - {line}" for line in mutant.before.splitlines())
    by = "\n".join(f"    + {line}" for line in mutant.after.splitlines())
    return f"{mutant.file}:{mutant.lines[0]}: {outcome}{f' ({excuse.reason})' if excuse else ''}\n{changed}\n{by}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--count", type=int, default=100, help="mutants of each target")
    parser.add_argument("--seconds", type=float, default=900, help="after which no further mutant of a target begins")
    parser.add_argument("--test-seconds", type=float, default=15, help="tests of a mutant, the quick ones first")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "mutants", help="where test times are kept")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
