"""What a calibration and a build ended with, in lines."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from spike_export.artifacts.visible_text import visible

if TYPE_CHECKING:
    from spike_export.artifacts.recipe import Recipe
    from spike_export.engines.build.reuse import ProvidedEngine


def print_notes(recipe: "Recipe", console: Console) -> None:
    """Print what the recipe remarks about itself."""
    for note in recipe.notes():
        console.print(Text(f"note: {visible(note)}"), soft_wrap=True)


def print_build(engine: "ProvidedEngine", console: Console) -> None:
    """Print the compiler's warnings, and whether the plan was built or kept."""
    for warning in engine.warnings:
        console.print(Text(f"the compiler warns: {visible(' '.join(warning.split()))}"), soft_wrap=True)
    console.print(Text(f"plan {engine.note}"), soft_wrap=True)
