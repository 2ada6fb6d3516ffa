"""Lines of text on a terminal, and elsewhere."""

import textwrap

from rich.console import Console
from rich.text import Text


def print_lines(console: Console, *lines: str, style: str = "") -> None:
    """Print lines without markup: wrapped between words on a terminal, whole elsewhere; no path is cut."""
    for line in lines:
        for part in _wrapped(line, console.width) if console.is_terminal else (line,):
            console.print(Text(part, style=style), soft_wrap=True)


def _wrapped(line: str, width: int) -> list[str]:
    """Return a line in parts between words; all begin with the spaces that the line begins with."""
    indent = " " * (len(line) - len(line.lstrip(" ")))
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [
        line
    ]


def print_whole(console: Console, *lines: str) -> None:
    """Print lines that are there to be copied, however wide the terminal, without markup."""
    for line in lines:
        console.print(Text(line), soft_wrap=True)
