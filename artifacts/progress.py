"""How long-running functions say how far they are, without knowing who listens."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being counted, done, total); never raises, never blocks."""


def silent(what: str, done: int, total: int) -> None:
    """Ignore progress."""
