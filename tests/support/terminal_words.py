"""What results look like on a terminal of 80 columns."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from spike_export.cli.terminal.output import Output, print_json

WIDTH = 80


def kept_words(patch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the lines in which each result would be told on a terminal; its document is printed."""
    lines: list[str] = []

    def result(_: Output, document: Any, show: Callable[[Console], None]) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=WIDTH, color_system=None)
        with console.capture() as captured:
            show(console)
        lines.extend(captured.get().splitlines())
        print_json(document)

    patch.setattr(Output, "result", result)
    return lines


def too_wide(lines: list[str]) -> list[str]:
    """Return the lines that a terminal would fold."""
    return [line for line in lines if cell_len(line) > WIDTH]
