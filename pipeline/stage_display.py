"""How a run tells which of its stages works: to a terminal, to a caller's function, or to nobody."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from spike_export.artifacts.progress import Progress, silent


class StageDisplay(AbstractContextManager[Any], Protocol):
    """Follows the stages of a run; entered before the first one, left after the last."""

    def stage(self, name: str, /) -> AbstractContextManager[Progress]:
        """Enter a stage; the block gets the callback that reports its progress."""

    def skip(self, stage: str, reason: str, /) -> None:
        """Take note that a stage need not run, and why."""


@dataclass(frozen=True)
class StageCallback(AbstractContextManager[Any]):
    """Reports the progress of every stage to one function, with the stage's name before what is counted.

    Attributes:
        progress: Called with (stage and what is being counted, done, total).
    """

    progress: Progress = silent

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def stage(self, name: str, /) -> AbstractContextManager[Progress]:
        """Enter a stage."""
        return nullcontext(lambda what, done, total: self.progress(f"{name}: {what}", done, total))

    def skip(self, stage: str, reason: str, /) -> None:
        """Report that a stage need not run."""
        self.progress(f"{stage}: {reason}", 1, 1)
