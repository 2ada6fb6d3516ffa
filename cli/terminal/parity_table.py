"""The parity chain for the reader: a verdict for each link, and how the error grows from layer to layer."""

from rich.console import Console

from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.text_table import print_table
from spike_export.engines.parity.chain import Link, Parity
from spike_export.engines.parity.comparison import Step

_LISTED = 5
"""Steps outside their tolerance that are named."""


def print_parity(parity: Parity, console: Console) -> None:
    """Print links, the steps outside their tolerance, and the growth of the error."""
    for link in parity.links:
        print_lines(console, _verdict(link), style="bold red" if link.outside else "")
        for step in link.outside[:_LISTED]:
            print_lines(console, f"  {_fault(step)}")
    print_lines(console, "not compared: TensorRT, whose plans show no inner values")
    columns = [*(link.growth for link in parity.links), parity.quantization]
    headings = ["transformers", "decoder", "bundle", "quantization"]
    shown = [(heading, rows) for heading, rows in zip(headings, columns, strict=True) if rows]
    places = [place.removeprefix("model.") for place, _ in parity.quantization]
    rows = [[place, *(f"{rows[index][1]:.1e}" for _, rows in shown)] for index, place in enumerate(places)]
    title = "Error of each layer's output, as a part of the output, where all compute on their own"
    print_table(console, title, ["output of", *(heading for heading, _ in shown)], rows)


def _verdict(link: Link) -> str:
    verdict = f"FAILED, {len(link.outside)} of {link.compared}" if link.outside else f"passed, all {link.compared}"
    outside = "outside" if link.outside else "within"
    return f"{link.name}: {verdict} steps {outside} their tolerance; the largest error is {link.worst.excess:.2g} of it"


def _fault(step: Step) -> str:
    where = f"{step.tokens} of {step.positions} tokens, most at token {step.token} of window {step.window}"
    return f"{step.name} ({step.what}): {step.excess:.3g} times the tolerance; {where}"
