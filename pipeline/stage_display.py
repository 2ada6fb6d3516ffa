"""How a run tells which of its stages works: to a terminal, to a caller's function, or to nobody."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from spike_export.artifacts.progress import Progress


class StageDisplay(AbstractContextManager[Any], Protocol):
    """Follows the stages of a run; entered before the first one, left after the last."""

    def stage(self, name: str, /) -> AbstractContextManager[Progress]:
        """Enter a stage; the block gets the callback that reports its progress."""

    def skip(self, stage: str, reason: str, /) -> None:
        """Take note that a stage need not run, and why."""
