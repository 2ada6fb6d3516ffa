"""README and documentation: the files, tests and Python names that they mention exist, and lists are lists."""

import ast
import importlib
import re
from itertools import pairwise

import pytest

import spike_export
from tests.support.documentation import ROOT, code_spans, examples, page_text, pages

_FILE = re.compile(r"[\w./-]+\.(?:py|toml|png|j2)")
_TEST = re.compile(r"test_\w+")
_ITEM = re.compile(r"(?:[-*]|\d+\.)\s")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

TOPS = {path.name for path in ROOT.iterdir()}
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def missing_file(span: str) -> bool:
    """Return whether a code span is the path of a file of the project that does not exist."""
    top, _, rest = span.partition("/")
    return bool(_FILE.fullmatch(span)) and bool(rest) and top in TOPS and not (ROOT / span).is_file()


@pytest.mark.parametrize("page", pages())
def test_files_and_tests_in_the_text_exist(page: str) -> None:
    spans = set(code_spans(page))
    assert sorted(filter(missing_file, spans)) == []
    assert sorted(span for span in spans if _TEST.fullmatch(span) and f"def {span}(" not in TESTS) == []


@pytest.mark.parametrize(
    "page", sorted({page for page in pages() if any(e.language == "python" for e in examples(page))})
)
def test_imports_of_python_that_is_not_run_exist(page: str) -> None:
    for example in examples(page):
        if example.language == "python" and example.reason is not None:
            for node in ast.walk(ast.parse(example.text)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    module = importlib.import_module(node.module)
                    assert [each.name for each in node.names if not hasattr(module, each.name)] == [], example.place


def test_the_front_page_is_short() -> None:
    assert len(page_text("README.md").splitlines()) <= 150


def test_a_file_that_was_moved_is_noticed() -> None:
    assert missing_file("engines/engines.py")
    assert not missing_file("engines/engine.py")


@pytest.mark.parametrize("page", pages())
def test_a_list_has_a_blank_line_before_it(page: str) -> None:
    """The site's Markdown shows a list without one as running text."""
    lines = [line for block in _FENCED.split(page_text(page)) for line in [*block.splitlines(), ""]]
    runs_on = [
        line
        for before, line in pairwise(lines)
        if _ITEM.match(line) and before and not _ITEM.match(before) and not before.startswith((" ", "<!--"))
    ]
    assert runs_on == []


def test_every_public_name_is_documented() -> None:
    documented = {
        line.rpartition(".")[2] for line in page_text("docs/python-api.md").splitlines() if line.startswith(":::")
    }
    assert sorted(documented) == sorted(spike_export.__all__)
