"""Which tests run which lines, and how long each takes: measured once, and kept in a file."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import coverage
import pytest

from tests.mutants.changes import Mutant


@dataclass(frozen=True)
class CoveringTests:
    """Tests by the lines they run.

    Attributes:
        lines: File → line → tests; a line that a fixture ran is of every test of the fixture's file.
        seconds: Of each test, with what is set up for it first.
    """

    lines: Mapping[str, Mapping[str, Sequence[str]]]
    seconds: Mapping[str, float]

    @classmethod
    def measured(cls, root: Path, files: Sequence[str], tests: Sequence[str]) -> Self:
        """Run tests and note which lines of `files` each of them runs."""
        recorder = coverage.Coverage(data_file=None, include=[str(root / file) for file in files])
        watch = _Watch(recorder)
        recorder.start()
        code = pytest.main([*tests, "-q", "--no-header", "-p", "no:cacheprovider"], plugins=[watch])
        recorder.stop()
        if code:
            raise SystemExit(f"the tests fail without any mutant (exit code {code})")
        return cls(_lines(root, recorder.get_data(), list(watch.seconds)), watch.seconds)

    @classmethod
    def kept(cls, place: Path, root: Path, files: Sequence[str], tests: Sequence[str]) -> Self:
        """Return what the file at `place` holds; measure, and write the file, where it is older than a source."""
        sources = [path for name in (*files, *tests) for path in _python_files(root / name)]
        if not place.is_file() or place.stat().st_mtime < max(path.stat().st_mtime for path in sources):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(asdict(cls.measured(root, files, tests))), encoding="utf-8")
        return cls(**json.loads(place.read_text(encoding="utf-8")))

    def of(self, mutant: Mutant, limit: float) -> list[str]:
        """Return the tests that run a mutant's lines, the quick ones first, as many as take `limit` seconds.

        Tests of one file stay together, for its fixtures' sake. Of lines that run at import, all tests of the file.
        """
        lines = self.lines.get(mutant.file, {})
        first, last = mutant.lines
        names = {name for line in range(first, last + 1) for name in lines.get(str(line), ())}
        names = names or {name for known in lines.values() for name in known}
        by_file = defaultdict(list)
        for name in sorted(names, key=lambda name: self.seconds.get(name, 0.0)):
            by_file[name.partition("::")[0]].append(name)
        chosen: list[str] = []
        for group in sorted(by_file.values(), key=lambda group: self.seconds.get(group[0], 0.0)):
            for name in group:
                limit -= self.seconds.get(name, 0.0)
                if limit < 0 and chosen:
                    break
                chosen.append(name)
        return chosen


def _python_files(place: Path) -> list[Path]:
    return [place] if place.is_file() else list(place.rglob("*.py"))


class _Watch:
    """Tells the recorder which test runs, and whether it is being set up."""

    def __init__(self, recorder: coverage.Coverage) -> None:
        self._recorder = recorder
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self._recorder.switch_context(item.nodeid.partition("::")[0])
        yield from self._timed(item.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self._recorder.switch_context(item.nodeid)
        yield from self._timed(item.nodeid)

    def _timed(self, name: str) -> Iterator[Any]:
        begun = time.monotonic()
        try:
            return (yield)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun


def _lines(root: Path, data: coverage.CoverageData, tests: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    of_file = defaultdict(list)
    for name in tests:
        of_file[name.partition("::")[0]].append(name)
    found: dict[str, dict[str, list[str]]] = {}
    for file in data.measured_files():
        by_line = data.contexts_by_lineno(file)
        found[str(Path(file).relative_to(root))] = {
            # No context: the line ran at import.
            str(line): sorted({name for context in contexts if context for name in of_file.get(context, [context])})
            for line, contexts in by_line.items()
        }
    return found
