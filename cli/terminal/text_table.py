"""Tables for a terminal, and the same as aligned lines where there is none."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.lines import print_lines


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; without boxes and never folded when the console is not a terminal."""
    # As Text: names come from files, and brackets in a string would be read as markup.
    cells = [[visible(cell) for cell in row] for row in rows]
    if console.is_terminal:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    print_lines(console, title)
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print_lines(console, f"  {text.rstrip()}")


def print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print one line for each label and its value."""
    for label, value in facts:
        print_lines(console, f"{label}: {visible(value)}")


def size_in_words(size: int) -> str:
    """Return a number of bytes as `123` or, from a kilobyte on, such as `334942380 (335 MB)` (decimal units)."""
    value, unit = float(size), ""
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} ({value:.{0 if value >= 100 else 1}f} {unit})" if unit else str(size)


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges: `0-2, 9`."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def counts_in_words(counts: Sequence[int]) -> str:
    """Return a count for each index: `12` where all are alike, else such as `13 (0), 12 (1-29)`; empty for none."""
    indices: dict[int, list[int]] = {}
    for index, count in enumerate(counts):
        indices.setdefault(count, []).append(index)
    if len(indices) < 2:
        return "".join(str(count) for count in indices)
    return ", ".join(f"{count} ({ranges(those)})" for count, those in indices.items())
