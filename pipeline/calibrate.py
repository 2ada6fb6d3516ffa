"""Calibration in a work directory: of all windows, or of one shard of them."""

from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.corpus.files import CorpusOptions
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.statistics.partial_statistics import shard_samples
from spike_export.pipeline.cluster.cluster_options import ClusterOptions
from spike_export.pipeline.execution import ExecutionOptions
from spike_export.pipeline.job import Job
from spike_export.pipeline.opening import open_pipeline
from spike_export.pipeline.stage_display import StageCallback, StageDisplay


@dataclass(frozen=True)
class CalibratedModel:
    """What a calibration leaves.

    Attributes:
        recipe: Precision, scale and reason of every linear, prefix and smoothing.
        work_dir: Folder with the recipe and the statistics.
    """

    recipe: Recipe
    work_dir: Path

    @property
    def recipe_file(self) -> Path:
        """The recipe, as JSON to read and to edit."""
        return self.work_dir / "recipe.json"

    @property
    def statistics_file(self) -> Path:
        """What was measured of the model as it is; `spikes.safetensors` beside it holds the figures of each token."""
        return self.work_dir / "spikes.json"


def calibrate(
    model: Path | str,
    work_dir: Path | str,
    options: CalibrationOptions = CalibrationOptions(),
    *,
    corpus: CorpusOptions = CorpusOptions(),
    execution: ExecutionOptions = ExecutionOptions(),
    cluster: ClusterOptions | None = None,
    display: StageDisplay = StageCallback(),
    recompute_recipe: bool = False,
    attribution_windows: int = 0,
    force: bool = False,
    overwrite: bool = False,
) -> CalibratedModel:
    """Measure activation spikes, choose prefix, smoothing and modules, and write the recipe.

    A stage that is done already in the work directory, on the same inputs, is not run again. A recipe that was edited
    by hand is kept and returned.

    Args:
        model: HF directory, `.gguf` file, or hub id.
        work_dir: Where statistics and recipe go.
        options: What to measure, and how to choose.
        corpus: The text to calibrate on.
        execution: Devices, precision of the forward passes, and whether layers stay in memory.
        cluster: Ray cluster whose workers forward the windows; None to do it in this process.
        display: Follows the stages; `StageCallback(function)` reports all of them to one function.
        recompute_recipe: Move a recipe that was edited by hand to `recipe.json.old`, and choose anew.
        attribution_windows: Windows on which to measure how much of the divergence each input causes, into
            `attribution.json`; 0 not to.
        force: Run stages again whose inputs are unchanged.
        overwrite: Replace also files that spike-export did not write.

    Raises:
        CheckpointError: The model cannot be read or is not supported, or a device is not there.
        CorpusError: The corpus cannot be used.
        CalibrationError: A value is not finite.
        RecipeError: An option exceeds what the model takes.
        ArtifactError: The work directory cannot be written, or holds a file that cannot be read.
    """
    job = Job(
        str(model),
        Path(work_dir),
        calibration=options,
        corpus=corpus,
        execution=execution,
        cluster=cluster,
        recompute_recipe=recompute_recipe,
        attribution_windows=attribution_windows,
    )
    with open_pipeline(job, display, force=force, overwrite=overwrite) as pipeline, display:
        recipe = pipeline.calibrate()
        if attribution_windows:
            pipeline.attribute(recipe)
        return CalibratedModel(recipe, job.work_dir)


def measure_shard(
    model: Path | str,
    work_dir: Path | str,
    shard: tuple[int, int],
    options: CalibrationOptions = CalibrationOptions(),
    *,
    corpus: CorpusOptions = CorpusOptions(),
    execution: ExecutionOptions = ExecutionOptions(),
    display: StageDisplay = StageCallback(),
    force: bool = False,
    overwrite: bool = False,
) -> Path:
    """Measure one part of the calibration windows, for `merge_shards`; return the file of the statistics.

    Args:
        model: HF directory, `.gguf` file, or hub id.
        work_dir: Where the part's statistics go.
        shard: (i, n): the i-th of n parts, counted from 1.
        options: The same for all parts.
        corpus: The same for all parts.
        execution: Devices, precision of the forward passes, and whether layers stay in memory.
        display: Follows the stage.
        force: Measure again what is unchanged.
        overwrite: Replace also files that spike-export did not write.

    Raises:
        SpikeExportError: As `calibrate`; a CorpusError where the part holds no window.
    """
    shard_samples(options.samples, shard)  # an empty shard is refused before the model is opened
    job = Job(str(model), Path(work_dir), calibration=options, corpus=corpus, execution=execution)
    with open_pipeline(job, display, force=force, overwrite=overwrite) as pipeline, display:
        pipeline.measure(shard)
    return job.work_dir / "spikes.json"
