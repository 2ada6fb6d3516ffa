"""The title of a report, and its result in one or two sentences."""

from collections.abc import Mapping
from typing import Any

from spike_export.artifacts.results.check_document import Check
from spike_export.artifacts.visible_text import visible
from spike_export.report.check_table import NOT_MEASURED, with_margin
from spike_export.report.loaded import Loaded


def title(loaded: Loaded) -> str:
    """Return the model's name."""
    if loaded.recipe is not None:
        return visible(loaded.recipe.model.source)
    return _manifest_title(loaded.manifest)


def _manifest_title(manifest: Mapping[str, Any] | None) -> str:
    model = (manifest or {}).get("model")
    source = model.get("source") if isinstance(model, dict) else model
    return visible(source) if isinstance(source, str) and source else "a language model"


def headline(loaded: Loaded) -> str:
    """Return the result in one or two sentences."""
    recipe = loaded.recipe
    if recipe is None:
        return f"{_accuracy_clause(loaded.check)} {_unquantized_clause(loaded)}".strip()
    total, kept = len(recipe.modules), len(recipe.kept())
    quantized = f"{total - kept} of {total} linears ({_share(total - kept, total)}) run in {_format(loaded)}"
    count = len(recipe.prefix_ids)
    prefix = f" behind the prefix “{visible(recipe.prefix.text)}” ({_tokens(count)})" if recipe.prefix else ""
    return f"{_accuracy_clause(loaded.check)} {quantized}{prefix}.".strip()


def _format(loaded: Loaded) -> str:
    """Return what the bundle's quantized linears are in."""
    return "FP8" if "fp8" in ((loaded.manifest or {}).get("linears") or {}) else "INT8"


def _unquantized_clause(loaded: Loaded) -> str:
    dtype = (loaded.manifest or {}).get("dtype")
    if isinstance(dtype, str):
        return f"Exported in {visible(dtype)} without a recipe."
    return visible(loaded.absences["recipe"])


def _accuracy_clause(check: Check | None) -> str:
    if check is None:
        return ""
    shipped = check.shipped
    if shipped is None:
        return f"Perplexity in {check.reference.dtype}: {check.reference.perplexity:.3f}."
    cost = "" if shipped.cost is None else f" ({with_margin(shipped.cost.increase)})"
    behind = check.reference.behind_prefix
    before = f"{check.reference.perplexity:.3f}" if behind is None else f"{behind:.3f} behind the prefix"
    return (
        f"Perplexity goes from {before} in {visible(check.reference.dtype)} to {shipped.perplexity:.3f}{cost} as "
        f"{visible(shipped.name)}."
    )


def _share(part: int, total: int) -> str:
    return f"{100 * part / total:.1f} %" if total else NOT_MEASURED


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"
