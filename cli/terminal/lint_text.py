"""The linter's findings for the reader: a sentence for each rule, gravest first."""

from collections.abc import Mapping

from rich.console import Console

from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.lines import print_lines
from spike_export.engines.lint.finding import SEVERITIES, Finding, LintReport, Severity

_STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_lint(report: LintReport, console: Console) -> None:
    """Print what each rule found, and the counts; the JSON document has every place."""
    rules: dict[str, list[Finding]] = {}
    for finding in report.findings:
        rules.setdefault(finding.rule, []).append(finding)
    for found in rules.values():
        print_lines(console, _sentence(found), style=_STYLES[found[0].severity])
    print_lines(console, _summary(report))


def _sentence(found: list[Finding]) -> str:
    first = found[0]
    place = first.node if not first.scope else f"{first.scope}: {first.node}"
    op = f" ({first.op})" if first.op else ""
    module = f" of {first.module}" if first.module and not first.node.startswith(first.module) else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return visible(f"{first.severity}: {first.rule}: {place}{op}{module}{more}: {first.reason}; {first.remedy}")


def _summary(report: LintReport) -> str:
    counts = [(severity, report.count(severity)) for severity in SEVERITIES]
    return visible(f"{report.model}: ") + ", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for severity, n in counts)
