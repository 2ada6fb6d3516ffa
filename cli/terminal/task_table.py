"""Standard tasks on the terminal: the table of the report, and the limits."""

from rich.console import Console

from spike_export.artifacts.results.task_document import TaskAccuracy
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.text_table import print_table
from spike_export.report.task_table import TASK_HEADINGS, task_gates, task_rows, task_sentence


def print_task_accuracy(found: TaskAccuracy, console: Console) -> None:
    """Print tasks and gates."""
    print_lines(console, task_sentence(found))
    print_table(console, "Standard tasks", TASK_HEADINGS, task_rows(found))
    for passed, sentence in task_gates(found):
        print_lines(console, sentence, style="green" if passed else "bold red")
