"""What the program says about itself, on standard error: standard output belongs to the results."""

from rich.console import Console

from spike_export.cli.terminal.lines import print_lines


def say(line: str) -> None:
    """Print a line with the program's name before it."""
    print_lines(Console(stderr=True), f"spike-export: {line}")
