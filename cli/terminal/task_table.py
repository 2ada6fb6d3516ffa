"""Standard tasks on the terminal: the table of the report, and the limits."""

from rich.console import Console
from rich.text import Text

from spike_export.artifacts.task_document import TaskAccuracy
from spike_export.cli.terminal.text_table import print_table
from spike_export.report.task_table import TASK_HEADINGS, task_gates, task_rows, task_sentence


def print_task_accuracy(found: TaskAccuracy, console: Console) -> None:
    """Print tasks and gates."""
    console.print(Text(task_sentence(found)), soft_wrap=True)
    print_table(console, "Standard tasks", TASK_HEADINGS, task_rows(found))
    for passed, sentence in task_gates(found):
        console.print(Text(sentence, style="green" if passed else "bold red"), soft_wrap=True)
