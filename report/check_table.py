"""The accuracy check for the reader: `check.json` as a table on a terminal, as plain lines elsewhere."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spike_export.artifacts.results.check_document import Check, CheckCost, CheckGate, CheckInterval, CheckVariant
from spike_export.artifacts.visible_text import visible

NOT_MEASURED = "n/a"

HEADINGS = ("variant", "perplexity", "cost", "top-1", "KL", "8-bit", "kept")
"""The cost is the perplexity's increase over the unquantized model behind the same prefix; top-1 is the agreement with
that model, KL the divergence from it in nats."""


def number(value: float | None, digits: int = 4) -> str:
    """Return a measured value with `digits` significant digits."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def percent(fraction: float | None) -> str:
    """Return a fraction as a percentage."""
    if fraction is None or not math.isfinite(fraction):
        return NOT_MEASURED
    return f"{100 * fraction:.2f} %"


def with_margin(interval: CheckInterval) -> str:
    """Return a mean fraction with half the width of its interval, in per cent."""
    if not math.isfinite(interval.mean):
        return NOT_MEASURED
    digits = 2 if abs(interval.mean) < 0.1 else 1
    return f"{100 * interval.mean:+.{digits}f} +/- {100 * interval.margin:.{digits}f} %"


def count(value: int | None) -> str:
    """Return a count, or that it was not given."""
    return NOT_MEASURED if value is None else str(value)


def check_rows(check: Check) -> list[tuple[str, ...]]:
    """Return one row per variant under `HEADINGS`, the reference first."""
    return [*_reference_rows(check), *(_row(variant) for variant in check.variants)]


def shipped_rows(check: Check) -> list[bool]:
    """Return for each of `check_rows` whether it is the shipped variant's."""
    return [False] * len(_reference_rows(check)) + [variant.shipped for variant in check.variants]


def _reference_rows(check: Check) -> list[tuple[str, ...]]:
    name, empty = visible(check.reference.dtype), ("",) * (len(HEADINGS) - 2)
    rows = [(name, f"{check.reference.perplexity:.3f}", *empty)]
    if check.reference.behind_prefix is not None:
        # Without it a prefix that helps the unquantized model too would pass for a gain of quantization.
        rows.append((f"{name}, behind the prefix", f"{check.reference.behind_prefix:.3f}", *empty))
    return rows


def _row(variant: CheckVariant) -> tuple[str, ...]:
    return (
        visible(variant.name) + (" (shipped)" if variant.shipped else ""),
        f"{variant.perplexity:.3f}",
        NOT_MEASURED if variant.cost is None else with_margin(variant.cost.increase),
        percent(variant.top1_agreement),
        number(variant.kl_divergence, 3),
        _quantized(variant),
        count(variant.kept_linears),
    )


def _quantized(variant: CheckVariant) -> str:
    """Return how many linears are quantized, with the format where it is FP8."""
    return f"{variant.fp8_linears} FP8" if variant.fp8_linears else count(variant.int8_linears)


def corpus_sentence(check: Check) -> str:
    """Return on what the figures were measured."""
    windows = f", {check.corpus.windows} windows" if check.corpus.windows is not None else ""
    length = f" of {check.corpus.length} tokens" if windows and check.corpus.length is not None else ""
    note = f" {visible(check.note)}" if check.note else ""
    return (
        f"Measured in ONNX Runtime on {visible(check.corpus.name)}{windows}{length}, {visible(check.dtype)} where not "
        f"quantized, against transformers in {visible(check.reference.dtype)}.{note}"
    )


def cost_sentences(check: Check) -> list[str]:
    """Return what the shipped variant costs on each text, the calibration's kind first; none if not measured."""
    shipped = check.shipped
    if shipped is None or shipped.cost is None:
        return []
    behind = "" if check.reference.behind_prefix is None else " behind the same prefix"
    first = f"{visible(shipped.name)} against the unquantized model{behind}: {_cost_clause(shipped.cost)}"
    return [first, *(f"On {visible(text.corpus.name)}: {_cost_clause(text.cost)}" for text in check.texts)]


def _cost_clause(cost: CheckCost) -> str:
    quantiles = cost.quantiles
    divergence = f"{number(cost.divergence.mean, 3)} +/- {number(cost.divergence.margin, 2)} nats per token"
    tail = f"99 % of the positions up to {number(quantiles.p99, 2)}, the largest {number(quantiles.max, 2)}"
    return (
        f"perplexity {with_margin(cost.increase)} (95 % interval over windows), KL divergence {divergence} ({tail}), "
        f"the same most likely token at {percent(cost.top1_agreement.mean)} of the positions."
    )


def noise_sentences(check: Check) -> list[str]:
    """Return what differences mean nothing; nothing where that was not measured."""
    noise = check.noise
    if noise is None:
        return []
    windows = f"{noise.windows} window{'' if noise.windows == 1 else 's'}"
    change = f"{number(noise.divergence_change.mean, 2)} +/- {number(noise.divergence_change.margin, 2)} nats per token"
    return [
        f"Noise floor ({windows}): nudging its embeddings by {number(noise.nudge, 2)} changes the shipped bundle's "
        f"perplexity by {with_margin(noise.increase)} and its KL divergence by {change}. Before and after the nudge, "
        f"the most likely token is the same at {percent(noise.top1_agreement.mean)} of the positions, and the "
        f"divergence between the two is {number(noise.divergence.mean, 2)}. Smaller differences between bundles mean "
        "nothing."
    ]


def worst_lines(check: Check) -> list[str]:
    """Return a line for each of the shipped variant's worst positions."""
    cost = check.shipped.cost if check.shipped else None
    return [
        f"window {each.window}, token {each.position}: {number(each.divergence, 3)} nats  {visible(each.text)}".rstrip()
        for each in (cost.worst if cost else ())
    ]


def gate_sentence(gate: CheckGate) -> str:
    """Return one line for a gate."""
    verdict = "passed" if gate.passed else "MISSED"
    return (
        f"{verdict}: {visible(gate.name)}: the 95 % interval ends at {number(gate.value)}, limit {number(gate.limit)}"
    )


def check_table(check: Check) -> Table:
    """Return the check as a table for a terminal."""
    caption = Text(corpus_sentence(check))
    table = Table(title="Accuracy", caption=caption, title_justify="left", caption_justify="left")
    # So that the figures of each row fit into 80 columns; only names are folded.
    table.box, table.padding, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, (0, 1), False, True
    for heading in HEADINGS:
        name = heading == HEADINGS[0]
        table.add_column(heading, justify="left" if name else "right", overflow="fold", no_wrap=not name)
    for row, bold in zip(check_rows(check), shipped_rows(check), strict=True):
        # As Text: names come from a file, and brackets in a string would be read as markup.
        table.add_row(*(Text(cell) for cell in row), style="bold" if bold else None)
    return table


def plain_lines(check: Check) -> list[str]:
    """Return the check as aligned plain text."""
    rows = [HEADINGS, *check_rows(check)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [*cost_sentences(check), *noise_sentences(check), corpus_sentence(check)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def print_check(check: Check, console: Console) -> None:
    """Print table and gates; without boxes and colours when the console is not a terminal."""
    if console.is_terminal:
        for sentence in (*cost_sentences(check), *noise_sentences(check)):
            console.print(Text(sentence))
        console.print(check_table(check))
    else:
        for line in plain_lines(check):
            console.print(Text(line), soft_wrap=True)
    for gate in check.gates:
        style = "green" if gate.passed else "bold red"
        console.print(Text(gate_sentence(gate), style=style), soft_wrap=not console.is_terminal)
