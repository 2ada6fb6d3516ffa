"""Documents as facts: the inputs of a run, and what its bundle and its engine say of themselves."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spike_export.artifacts.recipe import Recipe
from spike_export.artifacts.results.command_log import Command
from spike_export.artifacts.visible_text import visible
from spike_export.report.check_table import number

MAX_FACTS = 80
"""Lines shown of a document whose keys we do not know."""

MAX_ENTRIES = 8
"""Entries shown of a list in such a document: a model has two cache tensors for each layer."""

Facts = list[tuple[str, str]]
"""Name and value."""


def run_facts(recipe: Recipe | None) -> Facts:
    """Return the inputs of a run."""
    if recipe is None:
        return []
    corpus = recipe.corpus
    inside = ", each inside one document" if corpus.windows == "documents" else ""
    return [
        ("Architecture", visible(recipe.model.architecture)),
        ("Weights", recipe.scheme.weights),
        ("Activations", f"{recipe.activations()}, range: {recipe.scheme.activation_range}"),
        ("Head", recipe.scheme.head),
        ("Hadamard transform", recipe.hadamard_places()),
        ("Not quantized", recipe.scheme.unquantized),
        ("Calibrated on", f"{visible(corpus.name)}: {corpus.samples} samples of {corpus.length} tokens{inside}"),
        ("Alpha", number(recipe.alpha) if recipe.alpha is not None else "none: no module is kept by its ratio"),
        ("Model SHA-256", visible(recipe.model.sha256)),
    ]


def engine_facts(sidecars: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    """Yield the leaves of the sidecars, each behind its name where they are two."""
    for name, document in sidecars.items():
        yield from flat(document if len(sidecars) == 1 else {name: document})


def command_lines(commands: Iterable[Command]) -> list[str]:
    """Return the command lines, quoted for a shell."""
    return [visible(shlex.join(command.words)) for command in commands]


def version_facts(commands: Sequence[Command]) -> Facts:
    """Return the versions of the tools that the last command ran with."""
    return [(visible(tool), visible(version)) for tool, version in commands[-1].versions.items()] if commands else []


def flat(document: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the leaves of a document as (path, text), at most `MAX_FACTS`; a list by its first entries."""
    leaves = list(_leaves(document, ""))
    yield from leaves[:MAX_FACTS]
    if len(leaves) > MAX_FACTS:
        yield "…", f"{len(leaves) - MAX_FACTS} more lines are in the file"


def _leaves(value: Any, path: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield visible(path), visible(_leaf_text(value, path))


def _leaf_text(value: Any, path: str) -> str:
    if isinstance(value, list):
        names = [str(inner.get("name", "unnamed")) if isinstance(inner, dict) else str(inner) for inner in value]
        more = f" and {len(names) - MAX_ENTRIES} more" if len(names) > MAX_ENTRIES else ""
        return ", ".join(names[:MAX_ENTRIES]) + more or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and path.endswith(("bytes", "plan.size")):
        return f"{value:,} ({value / 2**20:,.1f} MiB)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
