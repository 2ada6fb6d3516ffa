"""What a text clips, for the reader: the cost, the verdict, and the inputs that saturate most."""

from rich.console import Console

from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.text_table import print_table
from spike_export.engines.accuracy.clipping import DUE, Clipping

_LISTED = 10


def print_clipping(result: Clipping, console: Console) -> None:
    """Print cost and verdict, and the inputs of which most is clipped."""
    cost = result.cost
    print_lines(
        console,
        f"{visible(result.text)}, {result.windows} windows of {result.length} tokens: "
        f"{100 * result.share:.3g} % of the values in front of static scales are clipped",
        f"cost of clipping: perplexity {100 * cost.mean:+.2f} +/- {100 * cost.margin:.2f} % (95 % interval)",
        _verdict(result),
    )
    rows = [
        (each.module.removeprefix("model."), f"{100 * each.share:.3g} %", str(each.clipped))
        for each in result.inputs[:_LISTED]
        if each.clipped
    ]
    if rows:
        print_table(console, "Inputs of which most is clipped", ("input of", "clipped", "values"), rows)


def _verdict(result: Clipping) -> str:
    if result.due:
        return f"calibrating anew on such text is due: clipping costs more than {100 * DUE:g} %"
    return f"calibrating anew is not due: that clipping costs more than {100 * DUE:g} % is not shown"
