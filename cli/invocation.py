"""The command line that is running, for what a run records of its origin."""

from contextvars import ContextVar

COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())
"""The words, the program's name first; empty where a function was called from Python."""
