"""The main job: all stages over a work directory."""

from dataclasses import dataclass
from pathlib import Path

from spike_export.artifacts.recipe import Recipe
from spike_export.artifacts.results.check_document import Check
from spike_export.engines.build.reuse import ProvidedEngine
from spike_export.pipeline.job import Job
from spike_export.pipeline.opening import open_pipeline
from spike_export.pipeline.stage_display import StageCallback, StageDisplay


@dataclass(frozen=True)
class JobResult:
    """What the main job leaves.

    Attributes:
        recipe: None where the job does not quantize.
        bundle: Folder of the ONNX model.
        check: Accuracy of every variant, and whether the limit was kept.
        engine: None where the job asks for none, or the limit on accuracy was missed.
        report: The HTML page.
    """

    recipe: Recipe | None
    bundle: Path
    check: Check
    engine: ProvidedEngine | None
    report: Path


def run_job(
    job: Job, *, display: StageDisplay = StageCallback(), force: bool = False, overwrite: bool = False
) -> JobResult:
    """Calibrate, choose, export, check, build and report.

    A stage that is done already in the work directory, on the same inputs, is not run again. Nothing is built when the
    bundle misses the job's limit on accuracy.

    Args:
        job: The model, where results go, and the options of every stage.
        display: Follows the stages; `StageCallback(function)` reports all of them to one function.
        force: Run stages again whose inputs are unchanged.
        overwrite: Replace also files that spike-export did not write.

    Raises:
        SpikeExportError: An input or the environment stands in the way of some stage. What can be known beforehand is
            refused before the first stage.
    """
    with open_pipeline(job, display, force=force, overwrite=overwrite) as pipeline, display:
        recipe = pipeline.calibrate() if job.quantize else None
        bundle = pipeline.export(recipe)
        check = pipeline.check(recipe, bundle)
        engine = pipeline.build(bundle) if job.plan and check.passed else None
        return JobResult(recipe, bundle, check, engine, pipeline.report(built=engine is not None))
