"""The pages of the documentation, and the examples and options they show."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?(?P<fence>`{3,})(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
_SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Example:
    """A fenced block of a page.

    Attributes:
        page: Path from the project's root.
        line: Of the opening fence, counted from 1.
        language: What stands behind the opening fence; empty for nothing.
        text: The lines between the fences.
        reason: Why the tests do not run the block, from the comment above it; None where there is none.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Command lines of a block of shell commands, split into words; comments and continued lines are resolved."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def pages() -> list[str]:
    """Return README, CONTRIBUTING, CHANGELOG and the pages under `docs/`, as paths from the project's root."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def page_text(page: str) -> str:
    """Return a page as it is written."""
    return (ROOT / page).read_text(encoding="utf-8")


def examples(page: str, text: str | None = None) -> list[Example]:
    """Return the fenced blocks of a page in order; `text` replaces what the file holds."""
    text = page_text(page) if text is None else text
    return [
        Example(
            page,
            text.count("\n", 0, match.start("fence")) + 1,
            match["language"],
            match["text"],
            match["reason"],
        )
        for match in _FENCE.finditer(text)
    ]


def code_spans(page: str) -> Iterator[str]:
    """Yield the inline code of a page, without fenced blocks; a span that is broken over two lines is joined."""
    for match in _SPAN.finditer(_FENCE.sub("", page_text(page))):
        yield " ".join(match[1].split())


def json_keys() -> dict[str, list[str]]:
    """Return the documented keys of each command's `--json`."""
    section = page_text("docs/formats.md").partition("## Results as JSON")[2]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)
    return {command: re.findall(r"`([^`]+)`", keys) for command, keys in rows}
