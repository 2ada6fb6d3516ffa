"""The table at the end: of each format how many inputs were tried, and what became of them."""

import pytest

from tests.fuzz.tally import table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report for each in terminalreporter.stats.values() for report in each if hasattr(report, "user_properties")
    ]
    rows = [tuple(value) for report in reports for name, value in report.user_properties if name == "fuzzed"]
    if rows:
        terminalreporter.section("inputs from outside")
        for line in table(sorted(set(rows))):
            terminalreporter.line(line)
