"""A job made ready to run; whatever would stop a later stage is refused before the first one starts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from spike_export.artifacts.files.atomic_write import require_writable
from spike_export.artifacts.files.sole_writer import sole_writer
from spike_export.calibration.corpus.chat import rendered
from spike_export.calibration.corpus.files import OwnText, load_corpora, require_judge
from spike_export.calibration.methods.transform_choice import require_rotation
from spike_export.calibration.statistics.room import require_statistics_room
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.build.reuse import require_own_place
from spike_export.engines.plan.build_profiles import resolve_limits
from spike_export.export.cache_options import require_capacity
from spike_export.pipeline.cluster.ray_workers import RayWorkers, WorkerTask
from spike_export.pipeline.job import Job, require_buildable, require_length, require_room
from spike_export.pipeline.pipeline import ARTIFACTS, Pipeline
from spike_export.pipeline.run_directory import RunDirectory
from spike_export.pipeline.stage_display import StageDisplay


@contextmanager
def open_pipeline(
    job: Job, display: StageDisplay, *, force: bool = False, overwrite: bool = False
) -> Iterator[Pipeline]:
    """Yield the stages of a job, ready to run; no other process writes to its places during the block.

    Args:
        job: What to do.
        display: Follows the stages.
        force: Run stages again whose inputs are unchanged.
        overwrite: Replace also files that spike-export did not write.

    Raises:
        SpikeExportError: A place cannot be written or is in use, no backend builds what is asked for, the corpus or the
            model cannot be read, or options exceed what the model takes.
    """
    run = RunDirectory(job.work_dir, force, overwrite)
    with ExitStack() as locks:
        locks.enter_context(run.sole_writer())
        if job.plan:
            locks.enter_context(sole_writer(job.plan))
        pipeline = _pipeline(job, run, display)
        if job.cluster is not None:
            task = WorkerTask.of(job.model, pipeline.checkpoint, job.cluster, job.calibration, job.execution)
            workers = locks.enter_context(RayWorkers(job.cluster, task))
            pipeline = replace(pipeline, workers=workers)
        yield pipeline


def _pipeline(job: Job, run: RunDirectory, display: StageDisplay) -> Pipeline:
    _require_places(job, run)
    read = load_corpora(job.corpus)  # a bad corpus is reported before the model is opened
    require_judge(read)
    checkpoint = open_checkpoint(job.model)
    _require_options(job, checkpoint)
    texts = tuple(each if isinstance(each, OwnText) else rendered(each, checkpoint.tokenizer) for each in read)
    pipeline = Pipeline(job, checkpoint, run, display, texts)
    pipeline.require_texts()
    return pipeline


def _require_places(job: Job, run: RunDirectory) -> None:
    """Refuse places that cannot be written, and a plan that no backend here can build."""
    if job.plan:
        require_own_place(job.plan, job.build.split, overwrite=run.overwrite)
        require_buildable(job.build, job.number_format)
        require_writable(job.plan.parent)
        if job.build.timing_cache:
            require_writable(job.build.timing_cache.parent)
    run.require_own(ARTIFACTS)
    require_writable(job.work_dir)


def _require_options(job: Job, checkpoint: Checkpoint) -> None:
    """Refuse options that the model cannot follow."""
    require_capacity(job.cache, checkpoint.config)
    require_room(job.calibration.length, job.cache.capacity)
    require_length(job.calibration.length, checkpoint)
    if job.plan:
        resolve_limits(job.build, 0, checkpoint.config.max_position_embeddings, job.cache.capacity)
    if job.quantize:
        require_statistics_room(checkpoint.config, job.calibration.samples, job.calibration.length)
        require_rotation(job.calibration, checkpoint.config)
