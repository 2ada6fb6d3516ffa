"""What an export refuses before it reads the model."""

from pathlib import Path

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.ownership import is_bundle, require_replaceable
from spike_export.artifacts.recipe import NumberFormat


def require_quantized(number_format: NumberFormat, quantize: bool) -> None:
    """Refuse a number format for what is not quantized.

    Raises:
        RecipeError: Names both options.
    """
    if number_format != "int8" and not quantize:
        raise RecipeError(f"--number-format {number_format} and --no-quantize contradict each other; give one")


def require_bundle_or_nothing(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse to replace what is no bundle of ours, or holds other files too: its content would be lost.

    Raises:
        ArtifactError: A file, or a folder with other content, is there.
    """
    require_replaceable(folder, "a bundle", is_bundle, overwrite=overwrite)
