"""Help and progress stay within 80 columns of a terminal; what results look like, tests/cli/test_json.py tells."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.cli.main import app
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.progress_display import ProgressDisplay
from spike_export.cli.terminal.text_table import print_table
from spike_export.pipeline.job import Job
from spike_export.pipeline.pipeline import stages_of
from tests.support.terminal_words import WIDTH, too_wide


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=WIDTH, color_system=None)


@pytest.mark.parametrize("command", [None, *(name for name in app if not name.startswith("-"))])
def test_help(command: str | None) -> None:
    console = terminal()
    with console.capture() as captured:
        app.help_print([command] if command else [], console=console)
    lines = captured.get().splitlines()
    assert "Usage" in lines[0]
    assert too_wide(lines) == []


def test_progress_of_the_main_job(tmp_path: Path) -> None:
    stages = stages_of(Job("model", tmp_path, plan=tmp_path / "engine.plan", calibration=CalibrationOptions()))
    console = terminal()
    display = ProgressDisplay(console, stages, clock=lambda: 12345.6)
    for stage in stages[1:]:
        with display.stage(stage) as progress:
            progress("layers of a model with a long name and experts", 123456, 1234567)
            with console.capture() as captured:
                console.print(display.frame())
            assert too_wide(captured.get().splitlines()) == []
    assert len(captured.get().splitlines()) == len(stages)


def test_a_table_folds_its_cells_and_a_sentence_wraps_between_words() -> None:
    console, path = terminal(), "/" + "folder/" * 20
    with console.capture() as captured:
        print_table(console, "Modules", ("module", "reason"), [("model.layers.11." * 9, "ratio " * 30)])
        print_lines(console, "  " + "word " * 40, f"bundle: {path}")
    *others, last = captured.get().splitlines()
    assert too_wide(others) == []
    assert last == path
    assert others[-2].startswith("  word ")
