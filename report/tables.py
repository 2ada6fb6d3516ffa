"""The tables of a report: rows of text."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spike_export.artifacts.recipe import Recipe
from spike_export.artifacts.results.check_document import Check
from spike_export.artifacts.results.speed_document import Speed
from spike_export.artifacts.visible_text import visible
from spike_export.report.check_table import check_rows, number, shipped_rows
from spike_export.report.figures.style import layer_of
from spike_export.report.loaded import Loaded
from spike_export.report.spiking_tokens import spiking_tokens

CHOSEN = "chosen"
"""The verdict of the candidate that a search took."""


@dataclass(frozen=True)
class TableRow:
    """Cells as text; `strong` marks the row that the reader looks for."""

    cells: tuple[str, ...]
    strong: bool = False


def token_rows(loaded: Loaded) -> list[TableRow]:
    """Return the tokens that spike without a prefix, the largest ratio first."""
    if loaded.before is None:
        return []
    return [
        TableRow(
            (
                visible(token.module),
                _layer_text(token.module),
                loaded.token_text(token.token_id),
                str(token.token_id),
                str(token.position),
                number(token.amax),
                number(token.ratio),
            )
        )
        for token in spiking_tokens(loaded.before)
    ]


def kept_rows(recipe: Recipe | None) -> list[TableRow]:
    """Return the linears that are not quantized, the highest ratio first."""
    if recipe is None:
        return []
    plans = [(name, plan) for name, plan in recipe.modules.items() if plan.number_format is None]
    plans.sort(key=lambda item: -(item[1].ratio or 0.0))
    return [
        TableRow((visible(name), plan.precision, number(plan.ratio), visible(plan.reason or "")))
        for name, plan in plans
    ]


def kept_sentence(recipe: Recipe | None) -> str:
    """Return how many linears are not quantized."""
    if recipe is None:
        return ""
    kept = len(recipe.kept())
    if kept == 0:
        return "All linears are quantized."
    verb = "linear is" if kept == 1 else "linears are"
    return f"{kept} of {len(recipe.modules)} {verb} not quantized, highest ratio first, with the reason."


def prefix_rows(recipe: Recipe | None) -> list[TableRow]:
    """Return the prefixes that competed; the chosen one is marked."""
    if recipe is None:
        return []
    return [
        TableRow(
            (
                f"“{visible(candidate.text)}”" if candidate.token_ids else "no prefix",
                " ".join(map(str, candidate.token_ids)),
                visible(candidate.worst_module),
                number(candidate.ratio),
                number(candidate.perplexity, 5),
                visible(candidate.verdict),
            ),
            strong=candidate.token_ids == recipe.prefix_ids,
        )
        for candidate in recipe.search.prefixes
    ]


def check_table_rows(check: Check | None) -> list[TableRow]:
    """Return the rows of the accuracy check; the shipped variant's is marked."""
    if check is None:
        return []
    return [TableRow(row, strong) for row, strong in zip(check_rows(check), shipped_rows(check), strict=True)]


def speed_rows(speeds: Sequence[Speed]) -> list[TableRow]:
    """Return what a server of the bundle did under load; times in milliseconds, median and 99 %."""
    return [
        TableRow(
            (
                str(speed.concurrency),
                str(speed.requests),
                number(speed.tokens_per_second),
                *(_milliseconds(time) for time in _times(speed)),
            )
        )
        for speed in speeds
    ]


def _times(speed: Speed) -> tuple[float | None, ...]:
    first, per_token = speed.time_to_first_token, speed.time_per_token
    return first.p50, first.p99, per_token.p50, per_token.p99


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds, 3)


def transform_rows(recipe: Recipe | None) -> list[TableRow]:
    """Return the rotations, smoothings and Hadamard transforms that competed."""
    if recipe is None:
        return []
    return [
        TableRow(
            (visible(each.name), number(each.perplexity, 5), number(each.divergence, 3), visible(each.verdict)),
            strong=each.verdict == CHOSEN,
        )
        for each in recipe.search.transforms
    ]


def kind_rows(recipe: Recipe | None) -> list[TableRow]:
    """Return the sets of inputs with a scale per token that competed."""
    if recipe is None:
        return []
    return [
        TableRow(
            (
                str(each.per_token_linears),
                f"{each.per_token_share:.1%}",
                number(each.perplexity, 5),
                number(each.divergence, 3),
                visible(each.verdict),
            ),
            strong=each.verdict == CHOSEN,
        )
        for each in recipe.search.activations
    ]


def smoothing_rows(recipe: Recipe | None) -> list[TableRow]:
    """Return how often each form of smoothing was chosen, by what reads the input."""
    if recipe is None:
        return []
    counts = Counter((name.rpartition(".")[2], plan.form, plan.parameter) for name, plan in recipe.smoothing.items())
    return [
        TableRow((visible(readers), form, number(parameter, 3), str(count)))
        for (readers, form, parameter), count in sorted(counts.items(), key=lambda item: (item[0][0], -item[1]))
    ]


def _layer_text(module: str) -> str:
    layer = layer_of(module)
    return "" if layer is None else str(layer)
