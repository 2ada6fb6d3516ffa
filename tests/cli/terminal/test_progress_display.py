"""The progress display: plain lines under a fake clock, the live list on a recorded terminal, silence when quiet."""

import re
from io import StringIO

import pytest
from rich.console import Console

from spike_export.cli.terminal.progress_display import Count, ProgressDisplay, duration

STAGES = ["calibrate", "export", "check"]


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


class FlushCountingStream(StringIO):
    """Remembers how often it was flushed."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def plain(quiet: bool = False) -> tuple[FlushCountingStream, FakeClock, ProgressDisplay]:
    stream, clock = FlushCountingStream(), FakeClock()
    console = Console(file=stream, force_terminal=False, width=40)
    return stream, clock, ProgressDisplay(console, STAGES, quiet=quiet, clock=clock)


def terminal(width: int = 100) -> tuple[StringIO, FakeClock, ProgressDisplay, Console]:
    stream, clock = StringIO(), FakeClock()
    console = Console(file=stream, force_terminal=True, width=width, height=30, _environ={"TERM": "xterm"})
    return stream, clock, ProgressDisplay(console, STAGES, clock=clock), console


def frame(display: ProgressDisplay, width: int = 100) -> list[str]:
    console = Console(file=StringIO(), width=width, record=True, color_system=None)
    console.print(display.frame())
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_log_gets_start_tenths_and_end() -> None:
    stream, clock, display = plain()
    with display, display.stage("calibrate") as progress:
        for done in range(1, 21):
            clock.tick(2.0)
            progress("windows", done, 20)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/3] calibrate: started"
    assert lines[1] == "[1/3] calibrate: windows 2/20 (10 %), about 36.0 s left"
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == "[1/3] calibrate: done in 40.0 s"


def test_slow_work_gets_a_line_every_ten_seconds() -> None:
    stream, clock, display = plain()
    with display.stage("calibrate") as progress:
        for done in range(40):
            clock.tick(1.0)
            progress("windows", done, 1000)
    assert [line.split("windows ")[1].split("/")[0] for line in stream.getvalue().splitlines()[1:-1]] == [
        "9",
        "19",
        "29",
        "39",
    ]


def test_fast_work_does_not_flood_the_log() -> None:
    stream, clock, display = plain()
    with display.stage("calibrate") as progress:
        for done in range(1000):
            clock.tick(0.0001)
            progress("tensors", done, 1000)
    assert stream.getvalue().splitlines() == ["[1/3] calibrate: started", "[1/3] calibrate: done in 0.1 s"]


def test_an_hour_of_work_does_not_flood_the_log() -> None:
    stream, clock, display = plain()
    with display.stage("calibrate") as progress:
        for done in range(36_000):
            clock.tick(1.0)
            progress("windows", done, 1_000_000)
    # Every ten seconds would be 3,600 lines; a twentieth of the age each is 20 ln(36,000 / 200) + 20, about 124.
    assert 100 < len(stream.getvalue().splitlines()) < 150


def test_a_log_holds_no_control_characters_and_is_flushed_line_by_line() -> None:
    stream, clock, display = plain()
    with display:
        display.skip("calibrate", "same inputs\x1b[2J")
        display.note("a note with [bold]brackets[/bold]\nand a second line that is longer than the console is wide")
        before = stream.flushes
        with display.stage("export"):
            clock.tick(75.0)
        assert stream.flushes >= before + 2
    assert re.fullmatch(r"[\n\x20-\x7e]*", stream.getvalue())
    assert stream.getvalue().splitlines() == [
        "[1/3] calibrate: unchanged (same inputs\\x1b[2J)",
        "a note with [bold]brackets[/bold]",
        "and a second line that is longer than the console is wide",
        "[2/3] export: started",
        "[2/3] export: done in 1 min 15 s",
    ]


def test_another_count_in_the_same_stage_starts_anew() -> None:
    stream, clock, display = plain()
    with display.stage("calibrate") as progress:
        progress("windows", 0, 10)
        clock.tick(30.0)
        progress("windows", 10, 10)
        clock.tick(2.0)
        progress("candidates", 0, 4)
        clock.tick(5.0)
        progress("candidates", 1, 4)
    lines = stream.getvalue().splitlines()
    assert lines[1] == "[1/3] calibrate: windows 10/10 (100 %), about 0.0 s left"
    # Three more at five seconds each: the 30 seconds of the windows are not part of the pace.
    assert lines[2] == "[1/3] calibrate: candidates 1/4 (25 %), about 15.0 s left"


def test_an_unknown_total_is_counted_without_percentage() -> None:
    stream, clock, display = plain()
    with display.stage("export") as progress:
        clock.tick(11.0)
        progress("tensors", 7, 0)
        clock.tick(11.0)
        progress("writing", 0, 0)
    assert stream.getvalue().splitlines()[1:3] == ["[2/3] export: tensors 7", "[2/3] export: writing"]


def test_resumed_work_is_not_counted_as_speed() -> None:
    count = Count("windows", done=60, total=100, first_done=50, started=0.0, updated=20.0)
    assert count.seconds_left(20.0) == pytest.approx(80.0)  # 40 to go at 2 s each, not 20 / 60 s each
    assert count.seconds_left(30.0) == pytest.approx(70.0)
    assert Count("windows", 50, 100, 50, 0.0, 20.0).seconds_left(20.0) is None


@pytest.mark.parametrize(("error", "word"), [(ValueError("bad"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_an_error_ends_the_stage_and_goes_on(error: BaseException, word: str) -> None:
    stream, clock, display = plain()

    def work() -> None:
        with display, display.stage("export"):
            clock.tick(2.0)
            raise error

    with pytest.raises(type(error)):
        work()
    assert stream.getvalue().splitlines()[-1] == f"[2/3] export: {word} after 2.0 s"


def test_quiet_is_silent_and_still_counts() -> None:
    stream, clock, display = plain(quiet=True)
    with display:
        display.skip("calibrate", "same")
        display.note("a note")
        with display.stage("export") as progress:
            clock.tick(60.0)
            progress("tensors", 1, 2)
    assert stream.getvalue() == ""


def test_an_unannounced_stage_is_a_bug() -> None:
    _, _, display = plain()
    with pytest.raises(KeyError, match="serve"), display.stage("serve"):
        pass


def test_the_list_shows_each_stage_as_it_stands() -> None:
    _, clock, display, _ = terminal()
    display.skip("calibrate", "inputs as before")
    with display.stage("export") as progress:
        progress("tensors", 0, 8)
        clock.tick(6.0)
        progress("tensors", 2, 8)
        lines = frame(display)
        assert re.fullmatch(r"calibrate +unchanged: inputs as before", lines[0])
        assert re.fullmatch(r"export +6\.0 s +━.* tensors 2/8 \(25 %\), about 18\.0 s left", lines[1])
        assert re.fullmatch(r"check +waiting", lines[2])
    assert re.fullmatch(r"export +6\.0 s +done", frame(display)[1])


def test_the_list_fits_a_narrow_terminal() -> None:
    _, clock, display, _ = terminal(width=40)
    with display.stage("export") as progress:
        progress("tensors with a long description", 0, 8000)
        clock.tick(6.0)
        progress("tensors with a long description", 2000, 8000)
        lines = frame(display, width=40)
    assert len(lines) == len(STAGES)
    assert all(len(line) <= 40 for line in lines)


def test_a_terminal_shows_the_live_list_and_notes_above_it() -> None:
    stream, clock, display, _ = terminal()
    with display:
        with display.stage("calibrate") as progress:
            progress("windows", 1, 2)
            display.note("the corpus is small")
            clock.tick(3.0)
        with display.stage("export") as progress:
            progress("tensors", 0, 0)  # no total: the bar pulses
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert text.count("the corpus is small") == 1
    last = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-3:]
    assert re.fullmatch(r"calibrate +3\.0 s +done", last[0])
    assert re.fullmatch(r"export +0\.0 s +done", last[1])
    assert "[1/3]" not in text


def test_the_cursor_comes_back_after_an_error() -> None:
    stream, _, display, _ = terminal()

    def work() -> None:
        with display, display.stage("calibrate"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rindex(shown) > stream.getvalue().rindex(hidden)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (80.0, "1 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500.0, "2 h 05 min"),
    ],
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text
