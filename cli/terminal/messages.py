"""What the program says about itself, on standard error: standard output belongs to the results."""

from rich.console import Console
from rich.text import Text


def say(line: str) -> None:
    """Print a line with the program's name before it."""
    Console(stderr=True).print(Text(f"spike-export: {line}"), soft_wrap=True)
