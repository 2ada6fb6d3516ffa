"""The driver tells a change that a test notices from one that none does, and knows which tests run a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("coverage", reason="`make mutants` installs it")

from tests.mutants.accepted import Accepted, load_accepted, stale
from tests.mutants.covering_tests import CoveringTests
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]

SOURCE = '''"""A module to change."""


def is_small(value: int) -> bool:
    return value < 3


def is_large(value: int) -> bool:
    if value > 9:
        return True
    return False
'''

TESTS = """
from {package}planted import is_large, is_small

def test_small():
    assert (is_small(2), is_small(3)) == (True, False)

def test_large():
    assert is_large(10)
"""

OUTCOMES = """
import json, sys
from pathlib import Path
from tests.mutants.forks import Trial, outcomes
from tests.mutants.mutant import Mutant

root = Path(sys.argv[1])
source = (root / "planted.py").read_text()

def trial(before, after, test="test_planted.py", seconds=60):
    changed = source.replace(before, after)
    assert changed != source
    return Trial(Mutant("planted.py", (5, 5), before, after, changed), [str(root / test)], seconds)

trials = {
    "noticed": trial("value < 3", "value <= 3"),
    "unnoticed": trial("value > 9", "value >= 9"),
    "no module": trial("def is_small", "import nothing_of_this_name\\ndef is_small"),
    "never ends": trial("value < 3", "__import__('time').sleep(600)", seconds=4),
    "no test": trial("value < 3", "value <= 3", test="test_nothing.py"),
    "no mutant": Trial(None, [str(root / "test_unrelated.py")], 60),
}
names = {id(each): name for name, each in trials.items()}
print(json.dumps({names[id(each)]: outcome for each, outcome in outcomes(root, iter(trials.values()), 6)}))
"""

COVERING = """
import json, os, sys
from pathlib import Path
from tests.mutants.covering_tests import CoveringTests
from tests.mutants.mutant import Mutant

root = Path(sys.argv[1])
os.chdir(root)
measure, asked = CoveringTests.measured.__func__, []

def measured(cls, root, files, tests):
    asked.append(tests)
    return measure(cls, root, files, tests)

CoveringTests.measured = classmethod(measured)

def of_line(line):
    kept = CoveringTests.kept(root / "kept" / "tests.json", root, ["planted.py"], ["."])
    return sorted(kept.of(Mutant("planted.py", (line, line), "", "", ""), 60))

chosen = [of_line(5), of_line(10), of_line(8)]
later = (root / "kept" / "tests.json").stat().st_mtime + 1
(root / "test_lines.py").write_text((root / "test_lines.py").read_text().replace("test_large", "test_huge"))
os.utime(root / "test_lines.py", (later, later))
del sys.modules["test_lines"]
chosen.append(of_line(10))
print(json.dumps([chosen, asked]), file=sys.stderr)
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    (tmp_path / "planted.py").write_text(SOURCE)
    (tmp_path / "test_planted.py").write_text(TESTS.format(package="spike_export."))
    (tmp_path / "test_unrelated.py").write_text("def test_that_passes():\n    pass\n")
    (tmp_path / "test_nothing.py").write_text("")
    return tmp_path


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(folder)]
    without_plugins = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a second of imports in each fork
    return subprocess.run(command, cwd=ROOT, env=without_plugins, capture_output=True, text=True, check=True)


def test_outcomes_of_changes_that_are_known(planted: Path) -> None:
    assert json.loads(run(OUTCOMES, planted).stdout) == {
        "noticed": "killed",
        "unnoticed": "survived",
        "no module": "killed",
        "never ends": "timed out",
        "no test": "untested",
        "no mutant": "survived",
    }


def test_a_line_has_the_tests_that_run_it_and_only_changed_files_are_measured_again(planted: Path) -> None:
    for name in ("test_planted.py", "test_nothing.py"):
        (planted / name).unlink()
    (planted / "test_lines.py").write_text(TESTS.format(package=""))
    chosen, asked = json.loads(run(COVERING, planted).stderr.splitlines()[-1])
    small, large, huge = (f"test_lines.py::test_{name}" for name in ("small", "large", "huge"))
    assert chosen == [[small], [large], [large, small], [huge]]  # the third line runs at import
    assert asked == [["test_lines.py", "test_unrelated.py"], ["test_lines.py"]]


def test_tests_of_different_files_come_before_a_second_one_of_the_same() -> None:
    seconds = {"a.py::quick": 1.0, "a.py::second": 1.5, "a.py::slow": 9.0, "b.py::other": 2.0, "c.py::unrelated": 0.1}
    known = CoveringTests({"m.py": {"3": list(seconds)[:4]}}, seconds)
    mutant = Mutant("m.py", (2, 3), "", "", "")
    assert known.of(mutant, 4) == ["a.py::quick", "b.py::other"]
    assert known.of(mutant, 5) == ["a.py::quick", "a.py::second", "b.py::other"]
    assert known.of(mutant, 0.5) == ["a.py::quick"]
    assert known.of(Mutant("m.py", (9, 9), "", "", ""), 14) == [*list(seconds)[:3], "b.py::other"]


def test_accepted_mutants_are_of_lines_that_exist() -> None:
    assert stale(load_accepted(), ROOT) == []


def test_an_accepted_mutant_of_a_line_that_is_gone_is_reported(planted: Path) -> None:
    lines = {"value": "return value < 3", "two": "if value > 9:\nreturn True", "gone": "return value < 4"}
    known = {name: Accepted("planted.py", before, "pass", "a reason") for name, before in lines.items()}
    elsewhere = Accepted("removed.py", "return value < 3", "pass", "a reason")
    assert stale([*known.values(), elsewhere], planted) == [known["gone"], elsewhere]


def test_changes_are_of_what_computes(planted: Path) -> None:
    pytest.importorskip("mutmut", reason="`make mutants` installs it")
    from tests.mutants.changes import changes_of, sample

    (planted / "planted.py").write_text(SOURCE + "\n\ndef pairs(a, b):\n    return zip(a, b, strict=True)\n")
    changes = changes_of(planted, "planted.py")
    mutants = list(sample([changes], 100, seed=0))
    assert ("return value < 3", "return value <= 3") in {(mutant.before, mutant.after) for mutant in mutants}
    assert all(mutant.lines[0] > 3 for mutant in mutants)  # the docstring stays
    zipped = [mutant.after for mutant in mutants if "zip" in mutant.before]
    assert zipped
    assert all("strict=True" in after for after in zipped)
    assert [each.source for each in sample([changes], 4, seed=0)] == [each.source for each in mutants[:4]]
    assert [each.source for each in sample([changes], 4, seed=1)] != [each.source for each in mutants[:4]]
