"""Which tests run which lines, and how long each takes: measured once, and kept in a file."""

import ast
import json
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import coverage
import pytest

from tests.mutants.mutant import Mutant


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
        """Return what the file at `place` holds, up to date; write the file.

        Where a source is newer, its lines have moved and all tests are measured; else the test files that are newer.
        """
        written = place.stat().st_mtime if place.is_file() else 0.0
        known = cls({}, {})
        if written > max((root / file).stat().st_mtime for file in files):
            known = cls(**json.loads(place.read_text(encoding="utf-8")))
        test_files = [path for name in tests for path in _test_files(root / name)]
        old = {
            str(path.relative_to(root)) for path in test_files if path.stat().st_mtime < written
        } & known._known_files
        new = sorted({str(path.relative_to(root)) for path in test_files} - old)
        current = known._of(old)._with(cls.measured(root, files, new)) if new else known._of(old)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(asdict(current)), encoding="utf-8")
        return current

    @property
    def _known_files(self) -> set[str]:
        return {_file_of(name) for name in self.seconds}

    def _of(self, test_files: Container[str]) -> Self:
        """Return what is known of the tests of these files."""
        lines = {
            file: {line: [name for name in names if _file_of(name) in test_files] for line, names in known.items()}
            for file, known in self.lines.items()
        }
        return type(self)(lines, {name: each for name, each in self.seconds.items() if _file_of(name) in test_files})

    def _with(self, other: Self) -> Self:
        """Return what is known of the tests of both."""
        lines = {
            file: {
                line: [*self.lines.get(file, {}).get(line, ()), *other.lines.get(file, {}).get(line, ())]
                for line in {**self.lines.get(file, {}), **other.lines.get(file, {})}
            }
            for file in {**self.lines, **other.lines}
        }
        return type(self)(lines, {**self.seconds, **other.seconds})

    def of(self, mutant: Mutant, limit: float) -> list[str]:
        """Return tests that run a mutant's lines, as many as take `limit` seconds, at least one.

        The quickest of every file come first, then the second of every file, and so on: tests of one file often look
        at the same thing. Tests of one file stay together, for its fixtures' sake. Of lines that run at import, all
        tests of the file.
        """
        lines = self.lines.get(mutant.file, {})
        first, last = mutant.lines
        names = {name for line in range(first, last + 1) for name in lines.get(str(line), ())}
        names = names or {name for known in lines.values() for name in known}
        chosen: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._in_turn(names):
            seconds = self.seconds.get(name, 0.0)
            if seconds <= limit or not chosen:
                chosen[_file_of(name)].append(name)
                limit -= seconds
        return [name for names_of_file in chosen.values() for name in names_of_file]

    def _in_turn(self, names: Iterable[str]) -> list[str]:
        """Sort tests by their rank in their file, the quickest of equal rank first."""
        ranks: dict[str, int] = {}
        seen: Counter[str] = Counter()
        for name in sorted(names, key=lambda name: (self.seconds.get(name, 0.0), name)):
            ranks[name] = seen[_file_of(name)]
            seen[_file_of(name)] += 1
        return sorted(ranks, key=lambda name: (ranks[name], self.seconds.get(name, 0.0), name))


def _test_files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("test_*.py"))


def _file_of(test: str) -> str:
    return test.partition("::")[0]


class _Watch:
    """Tells the recorder which test runs, and whether it is being set up."""

    def __init__(self, recorder: coverage.Coverage) -> None:
        self._recorder = recorder
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self._recorder.switch_context(_file_of(item.nodeid))
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
        of_file[_file_of(name)].append(name)
    found: dict[str, dict[str, list[str]]] = {}
    for file in data.measured_files():
        by_line = data.contexts_by_lineno(file)
        found[str(Path(file).relative_to(root))] = {
            str(line): sorted({name for context in by_line[line] for name in of_file.get(context, [context]) if name})
            for line in _lines_of_functions(Path(file)) & by_line.keys()
        }
    return found


def _lines_of_functions(path: Path) -> set[int]:
    """Return the lines inside functions; all others run at import, in whichever test imports the file first."""
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {line for each in functions for line in range(each.body[0].lineno, (each.end_lineno or 0) + 1)}
