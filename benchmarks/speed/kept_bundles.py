"""Bundles that a benchmark keeps and finds again are of the model and the recipe in question, or are refused."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spike_export.artifacts.recipe import Recipe
    from spike_export.checkpoint.checkpoint import Checkpoint


def require_model(bundles: Iterable[Path], checkpoint: "Checkpoint") -> None:
    """End the program where one of the bundles is of another model."""
    from spike_export.artifacts.manifest import load_manifest

    for bundle in bundles:
        source = load_manifest(bundle).model
        if source.checkpoint_sha256 != checkpoint.tensors.sha256():
            raise SystemExit(
                f"{bundle}: made of {source.source}, not of this {checkpoint.name}; give another --bundles"
            )


def require_recipe(bundle: Path, recipe: "Recipe") -> None:
    """End the program where a bundle is of another recipe."""
    from spike_export.artifacts.manifest import load_manifest
    from spike_export.artifacts.recipe import recipe_sha256

    if load_manifest(bundle).model.recipe_sha256 != recipe_sha256(recipe):
        raise SystemExit(f"{bundle}: made by another recipe; give another --bundles")
