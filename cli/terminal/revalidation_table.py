"""What drifted, for the reader."""

from rich.console import Console

from spike_export.calibration.revalidation import DriftedModule, Revalidation
from spike_export.cli.terminal.lines import print_lines
from spike_export.cli.terminal.text_table import print_table


def print_revalidation(found: Revalidation, console: Console) -> None:
    """Print the verdict, what quantization costs, and the inputs that drifted."""
    size = f"{found.windows} windows of {found.tokens} tokens"
    lines = [
        f"{len(found.drifted)} of {found.compared} inputs drifted, on {size}",
        f"quantization by the recipe, simulated: perplexity {100 * found.increase:+.2f} %",
        "the recipe still fits" if found.passed else "calibrate this model anew",
    ]
    print_lines(console, *lines)
    if found.drifted:
        rows = [_row(each) for each in found.drifted]
        print_table(console, "Inputs that drifted", ("input of", "magnitude", "ratio", "why"), rows)


def _row(each: DriftedModule) -> tuple[str, ...]:
    growth = "n/a" if each.growth is None else f"x {each.growth:.3g}"
    return each.module.removeprefix("model."), growth, f"{each.ratio:.3g}", each.reason
