"""What a calibration and a build ended with, in lines."""

from typing import TYPE_CHECKING

from rich.console import Console

from spike_export.artifacts.visible_text import visible
from spike_export.cli.terminal.lines import print_lines

if TYPE_CHECKING:
    from spike_export.artifacts.recipe import Recipe
    from spike_export.engines.build.reuse import ProvidedEngine


def print_notes(recipe: "Recipe", console: Console) -> None:
    """Print what the recipe remarks about itself."""
    for note in recipe.notes():
        print_lines(console, f"note: {visible(note)}")


def print_build(engine: "ProvidedEngine", console: Console) -> None:
    """Print the compiler's warnings, and whether the plan was built or kept."""
    for warning in engine.warnings:
        print_lines(console, f"the compiler warns: {visible(' '.join(warning.split()))}")
    print_lines(console, f"plan {engine.note}")
