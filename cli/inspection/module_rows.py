"""Modules for a table: those of one name and one fate are one row, with the layers they are in."""

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

from spike_export.checkpoint.modules import split_name
from spike_export.cli.terminal.text_table import ranges

Facts = TypeVar("Facts", bound=Hashable)


def layer_and_name(module: str) -> tuple[int | None, str]:
    """Return the layer of a module or node, and its name inside; None and the whole name for the head."""
    try:
        return split_name(module)
    except ValueError:
        return None, module


def rows_over_layers(modules: Mapping[str, Facts]) -> Iterator[tuple[str, Facts, str]]:
    """Yield name inside the layer, facts, and layers in words, for each name with each of its facts."""
    rows: dict[tuple[str, Facts], list[int]] = {}
    for module, facts in modules.items():
        layer, name = layer_and_name(module)
        rows.setdefault((name, facts), []).extend([] if layer is None else [layer])
    return ((name, facts, ranges(sorted(layers))) for (name, facts), layers in rows.items())
