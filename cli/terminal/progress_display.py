"""The pipeline's progress: a live list of stages on a terminal, plain lines in a log, nothing when quiet."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spike_export.artifacts.progress import Progress
from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.lines import print_lines

Clock = Callable[[], float]
"""Seconds from any fixed point, never backwards."""

REFRESHES_PER_SECOND = 8
LINE_INTERVAL = 10.0
"""Seconds between lines of a log that nobody watches."""
MIN_LINE_INTERVAL = 1.0
"""Seconds between lines that a tenth of the work is worth."""
LONG_STAGE = 20
"""A stage's lines come no more often than its age over this, so that an hour does not fill the log."""

Status = Literal["waiting", "running", "done", "unchanged", "failed", "interrupted"]

_STATUS_STYLES: dict[Status, str] = {
    "waiting": "dim",
    "running": "bold",
    "done": "green",
    "unchanged": "dim",
    "failed": "bold red",
    "interrupted": "yellow",
}


@dataclass(frozen=True)
class Count:
    """How far one count of a stage is.

    Attributes:
        total: Zero when it is not known.
        first_done: `done` at the first report; resumed work starts above zero.
        started: Clock at the first report.
        updated: Clock at the last report.
    """

    what: str
    done: int
    total: int
    first_done: int
    started: float
    updated: float

    @property
    def fraction(self) -> float | None:
        """Share done, 0 to 1; None when the total is not known."""
        return min(self.done / self.total, 1.0) if self.total > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Return the time left at the pace so far; None when there is no pace yet."""
        advanced = self.done - self.first_done
        if self.total <= 0 or advanced <= 0:
            return None
        # The pace is that of the last report, so that the estimate counts down between two reports.
        left = (self.updated - self.started) / advanced * (self.total - self.done)
        return max(left - (now - self.updated), 0.0)


@dataclass(frozen=True)
class Stage:
    """What is known of one stage; replaced as a whole, so that the drawing thread never sees half a change."""

    name: str
    status: Status = "waiting"
    started: float = 0.0
    ended: float = 0.0
    detail: str = ""
    count: Count | None = None


class ProgressDisplay:
    """Shows the stages of a run while they work.

    On a terminal the stages are a list that is redrawn in place; elsewhere each stage gets plain lines. Use as a
    context manager; `stage` yields the `Progress` callback for the work.
    """

    def __init__(
        self, console: Console, stages: Sequence[str], *, quiet: bool = False, clock: Clock = time.monotonic
    ) -> None:
        """Prepare the display; nothing is printed yet.

        Args:
            console: Where to show; its being a terminal decides the form.
            stages: Names in the order they will run.
            quiet: Show nothing; errors are the caller's to print.
            clock: Seconds; another one in tests.
        """
        self._console = console
        self._quiet = quiet
        self._clock = clock
        self._stages = {name: Stage(name) for name in stages}
        self._live = None if quiet or not console.is_terminal or console.is_dumb_terminal else self._new_live()
        self._lines = _LineThrottle()

    def _new_live(self) -> Live:
        return Live(
            console=self._console,
            get_renderable=self.frame,
            refresh_per_second=REFRESHES_PER_SECOND,
            # Whatever a library writes to a terminal must go above the list, but a redirected stream stays as it is.
            redirect_stdout=_is_terminal("stdout"),
            redirect_stderr=_is_terminal("stderr"),
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Run one stage; the block gets the callback that moves its bar.

        Raises:
            KeyError: The name is none of the stages announced.
        """
        started = self._clock()
        self._change(replace(self._stages[name], status="running", started=started, detail="", count=None))
        self._lines = _LineThrottle(started)
        self._line(name, "started")
        try:
            yield lambda what, done, total: self._advance(name, what, done, total)
        except BaseException as error:
            self._finish(name, "failed" if isinstance(error, Exception) else "interrupted")
            raise
        self._finish(name, "done")

    def skip(self, stage: str, reason: str) -> None:
        """Show a stage as unchanged: its result is already there."""
        self._change(replace(self._stages[stage], status="unchanged", detail=visible(reason)))
        self._line(stage, f"unchanged ({visible(reason)})")

    def note(self, text: str) -> None:
        """Print a line of text, above the list on a terminal."""
        if not self._quiet:
            for line in text.splitlines():
                # On a terminal a live display of this console moves down by itself.
                print_lines(self._console, visible(line))

    def frame(self) -> RenderableType:
        """Return the list of stages as it stands now."""
        now = self._clock()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, min_width=7)
        grid.add_column(overflow="ellipsis", no_wrap=True)
        bar_width = max(10, min(30, self._console.width // 4))
        for stage in list(self._stages.values()):
            style = _STATUS_STYLES[stage.status]
            elapsed = Text(_elapsed(stage, now), style=style, justify="right")
            grid.add_row(Text(stage.name, style=style), elapsed, _stage_detail(stage, now, bar_width))
        return grid

    def _advance(self, name: str, what: str, done: int, total: int) -> None:
        now = self._clock()
        stage = self._stages[name]
        known = stage.count
        if known is None or known.what != what or done < known.done:
            count = Count(what, done, total, done, now, now)
            self._lines.restart()
        else:
            count = replace(known, done=done, total=total, updated=now)
        self._change(replace(stage, count=count))
        if self._live is None and not self._quiet and self._lines.due(count, now - stage.started, now):
            self._line(name, count_sentence(count, now))

    def _finish(self, name: str, status: Status) -> None:
        now = self._clock()
        stage = replace(self._stages[name], status=status, ended=now)
        self._change(stage)
        self._line(name, f"{status} {'in' if status == 'done' else 'after'} {duration(now - stage.started)}")

    def _change(self, stage: Stage) -> None:
        self._stages[stage.name] = stage

    def _line(self, name: str, text: str) -> None:
        if self._live is None and not self._quiet:
            index = list(self._stages).index(name) + 1
            print_lines(self._console, f"[{index}/{len(self._stages)}] {name}: {text}")


class _LineThrottle:
    """Decides which reports of one count deserve a line in a log."""

    def __init__(self, now: float = 0.0) -> None:
        self._last_line = now
        self._last_tenth = 0

    def restart(self) -> None:
        """Begin another count; the time of the last line stays, so that short counts cannot flood the log."""
        self._last_tenth = 0

    def due(self, count: Count, age: float, now: float) -> bool:
        """Return whether to print now, and remember it."""
        since = now - self._last_line
        tenth = int((count.fraction or 0.0) * 10)
        if not (
            since >= max(LINE_INTERVAL, age / LONG_STAGE) or (tenth > self._last_tenth and since >= MIN_LINE_INTERVAL)
        ):
            return False
        self._last_line, self._last_tenth = now, tenth
        return True


def duration(seconds: float) -> str:
    """Return a time span as one reads it: `3.2 s`, `1 min 20 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count_sentence(count: Count, now: float) -> str:
    """Return `windows 12/128 (9 %), about 1 min 20 s left`, as far as it is known."""
    what = visible(count.what)
    if count.fraction is None:
        return f"{what} {count.done}" if count.done else what
    text = f"{what} {count.done}/{count.total} ({int(100 * count.fraction)} %)"
    left = count.seconds_left(now)
    return text if left is None else f"{text}, about {duration(left)} left"


def _elapsed(stage: Stage, now: float) -> str:
    if stage.status in ("waiting", "unchanged"):
        return ""
    return duration((now if stage.status == "running" else stage.ended) - stage.started)


def _stage_detail(stage: Stage, now: float, bar_width: int) -> RenderableType:
    if stage.status != "running":
        words = f"{stage.status}: {stage.detail}" if stage.detail else stage.status
        return Text(words, style=_STATUS_STYLES[stage.status])
    count = stage.count
    fraction = count.fraction if count is not None else None
    row = Table.grid(padding=(0, 1))
    row.add_column(width=bar_width)
    row.add_column(overflow="ellipsis", no_wrap=True)
    # Without a total the bar pulses; its animation follows our clock.
    bar = ProgressBar(total=None if fraction is None else 1.0, completed=fraction or 0.0, animation_time=now)
    row.add_row(bar, Text(count_sentence(count, now) if count is not None else ""))
    return row


def _is_terminal(stream: Literal["stdout", "stderr"]) -> bool:
    file = getattr(sys, stream)
    return file is not None and file.isatty()
