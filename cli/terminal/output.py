"""What a command shows: its progress, and its result as text or as one JSON document."""

import codecs
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from spike_export.artifacts.progress import Progress
    from spike_export.cli.terminal.progress_display import ProgressDisplay


@dataclass(frozen=True)
class Output:
    """Where progress and results go.

    Attributes:
        quiet: Show neither progress nor a result in words.
        as_json: Print the result as JSON on standard output, and the progress on standard error.
    """

    quiet: bool = False
    as_json: bool = False

    def display(self, stages: Sequence[str]) -> "ProgressDisplay":
        """Return what follows stages of these names."""
        from spike_export.cli.terminal.progress_display import ProgressDisplay

        return ProgressDisplay(Console(stderr=self.as_json), stages, quiet=self.quiet)

    @contextmanager
    def progress(self, stage: str) -> Iterator["Progress"]:
        """Follow a single stage during the block."""
        with self.display([stage]) as display, display.stage(stage) as progress:
            yield progress

    def result(self, document: Any, show: Callable[[Console], None]) -> None:
        """Print a result: its document, or what `show` prints on a console."""
        if self.as_json:
            print_json(document)
        elif not self.quiet:
            show(Console())


def print_json(document: Any, out: IO[str] | None = None) -> None:
    """Print a document, on standard output by default.

    Characters that the output's encoding lacks become JSON's own escapes.
    """
    out = out or sys.stdout
    holds_all = codecs.lookup(getattr(out, "encoding", None) or "utf-8").name == "utf-8"
    out.write(json.dumps(document, ensure_ascii=not holds_all, indent=2) + "\n")
