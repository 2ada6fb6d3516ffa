"""What an export refuses before it reads the model."""

from pathlib import Path

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.manifest import MANIFEST_FILE
from spike_export.artifacts.recipe import NumberFormat


def require_quantized(number_format: NumberFormat, quantize: bool) -> None:
    """Refuse a number format for what is not quantized.

    Raises:
        RecipeError: Names both options.
    """
    if number_format != "int8" and not quantize:
        raise RecipeError(f"--number-format {number_format} and --no-quantize contradict each other; give one")


def require_bundle_or_nothing(folder: Path) -> None:
    """Refuse to replace what is no bundle: its content would be lost.

    Raises:
        ArtifactError: A file, or a folder with other content, is there.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).exists()):
        raise ArtifactError(f"{folder}: exists and is not a bundle; give another folder")
