"""The difference of two runs for the reader."""

from rich.console import Console

from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.text_table import print_table
from spike_export.engines.accuracy.intervals import Interval
from spike_export.inspection.difference import AccuracyDifference, ModuleDifference, RunDifference

_LISTED = 20


def print_difference(found: RunDifference, console: Console) -> None:
    """Print choices, accuracy, and the modules that are treated differently."""
    if found.choices:
        print_table(console, "Choices that differ", ("", "first", "second"), found.choices)
    else:
        print_lines(console, "The two runs made the same choices.")
    if found.accuracy:
        columns = ("text", "cost, first", "cost, second", "perplexity, second over first")
        print_table(console, "Accuracy (95 % intervals)", columns, [_accuracy(each) for each in found.accuracy])
    print_lines(console, _modules(found))
    if found.modules:
        columns = ("module", "first", "second", "ratio")
        print_table(console, "Modules that differ", columns, [_module(each) for each in found.modules[:_LISTED]])
    if len(found.modules) > _LISTED:
        print_lines(console, f"  and {len(found.modules) - _LISTED} more; --json has all")


def _modules(found: RunDifference) -> str:
    ratio = "" if found.ratio is None else f"; ratios, second over first: median {found.ratio:.3g}"
    return f"{len(found.modules)} of {found.compared} modules have another precision or kind of scale{ratio}"


def _module(each: ModuleDifference) -> tuple[str, ...]:
    ratio = "n/a" if each.ratio is None else f"x {each.ratio:.3g}"
    return each.module.removeprefix("model."), each.first, each.second, ratio


def _accuracy(each: AccuracyDifference) -> tuple[str, ...]:
    change = "not paired: other windows" if each.change is None else _percent(each.change)
    return each.text, _percent(each.first), _percent(each.second), change


def _percent(interval: Interval) -> str:
    return f"{100 * interval.mean:+.2f} +/- {100 * interval.margin:.2f} %"
