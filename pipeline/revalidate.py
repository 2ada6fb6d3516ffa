"""The recipe of an earlier run on a checkpoint that was trained further."""

from pathlib import Path

from spike_export.artifacts.errors import ArtifactError
from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.recipe import load_recipe
from spike_export.calibration.revalidation import Revalidation, revalidate_recipe
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.pipeline.evaluation_text import EvaluationText, evaluation_windows

WINDOWS = 4


def revalidate(
    run: Path | str,
    model: Path | str,
    text: EvaluationText = EvaluationText(),
    *,
    progress: Progress = silent,
) -> Revalidation:
    """Hold the recipe of a run against another checkpoint of the same architecture, on four windows.

    Args:
        run: Work directory of the run that made the recipe.
        model: HF directory, `.gguf` file or hub id of the checkpoint.
        text: Where the windows come from.
        progress: Told of the layers.

    Raises:
        ArtifactError: The folder has no recipe.
        RecipeError: The recipe is malformed, or of another architecture.
        CheckpointError: The model cannot be read.
        CorpusError: The corpus cannot be used.
        CalibrationError: An input was not finite.
    """
    path = Path(run) / "recipe.json"
    if not path.is_file():
        raise ArtifactError(f"{run}: no run's folder: it has no recipe.json; give a folder that calibrate wrote")
    recipe, checkpoint = load_recipe(path), open_checkpoint(str(model))
    _, windows = evaluation_windows(checkpoint, None, text)
    found = revalidate_recipe(checkpoint, recipe, windows[:WINDOWS], progress)
    checkpoint.require_unchanged()
    return found
