"""The linter's findings for the reader: one row per rule, gravest first."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spike_export.artifacts.visible_text import visible
from spike_export.engines.lint.finding import SEVERITIES, Finding, LintReport, Severity

HEADINGS = ("severity", "rule", "places", "first", "why", "remedy")

_STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}


def rule_rows(report: LintReport) -> list[tuple[Severity, tuple[str, ...]]]:
    """Return one row per rule that found something, under `HEADINGS`; the JSON document has every place."""
    rules: dict[str, list[Finding]] = {}
    for finding in report.findings:
        rules.setdefault(finding.rule, []).append(finding)
    return [(found[0].severity, _row(found)) for found in rules.values()]


def _row(found: list[Finding]) -> tuple[str, ...]:
    first = found[0]
    place = first.node if not first.scope else f"{first.scope}: {first.node}"
    op = f" ({first.op})" if first.op else ""
    module = f" of {first.module}" if first.module and not first.node.startswith(first.module) else ""
    cells = (first.severity, first.rule, str(len(found)), place + op + module, first.reason, first.remedy)
    return tuple(visible(cell) for cell in cells)


def summary(report: LintReport) -> str:
    """Return the counts in one line."""
    counts = [(severity, report.count(severity)) for severity in SEVERITIES]
    return f"{visible(report.model)}: " + ", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in counts)


def print_lint(report: LintReport, console: Console) -> None:
    """Print the rows and the counts; without boxes and colours when the console is not a terminal."""
    rows = rule_rows(report)
    if console.is_terminal and rows:
        table = Table(show_lines=True)
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading == "places" else "left", overflow="fold")
        for severity, row in rows:
            # As Text: names come from a file, and brackets in a string would be read as markup.
            table.add_row(*(Text(cell) for cell in row), style=_STYLES[severity])
        console.print(table)
    elif rows:
        for _, (grade, rule, places, first, why, remedy) in rows:
            more = f" (and {int(places) - 1} more)" if places != "1" else ""
            console.print(Text(f"{grade}: {rule}: {first}{more}: {why}; {remedy}"), soft_wrap=True)
    console.print(Text(summary(report)), soft_wrap=True)
