"""`python -m tests.support.killed_runs MODEL CORPUS WHOLE KILLED`: one run undisturbed, one killed again and again.

An attempt on KILLED dies by SIGKILL just before the first artifact or stamp that no earlier attempt died before; the
last one finds none and comes through. Attempts are forked: importing the libraries takes longer than the runs.
Prints before which file each died.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from spike_export.calibration.corpus.files import CorpusOptions
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.cli.terminal.progress_display import ProgressDisplay
from spike_export.pipeline.job import Job
from spike_export.pipeline.pipeline import Pipeline, stages_of
from spike_export.pipeline.run_directory import RunDirectory
from tests.support.blank_pictures import pictures_left_blank


def job(model: Path, corpus: Path, work_dir: Path, **options: Any) -> Job:
    """Return a small job without a plan; its six windows are measured in two parts."""
    settings: dict[str, Any] = {"samples": 6, "length": 32} | options
    return Job(str(model), work_dir, calibration=CalibrationOptions(**settings), corpus=CorpusOptions(corpus))


def pipeline_of(work: Job, console: Console | None = None, force: bool = False) -> Pipeline:
    """Return the job's pipeline."""
    display = ProgressDisplay(console or Console(), stages_of(work), quiet=console is None)
    return Pipeline(work, open_checkpoint(work.model), RunDirectory(work.work_dir, force), display)


def run_to_the_report(pipeline: Pipeline) -> None:
    """Run all stages but the plan."""
    recipe = pipeline.calibrate() if pipeline.job.quantize else None
    pipeline.check(recipe, pipeline.export(recipe))
    pipeline.report(built=False)


def die_before_renames(folder: Path, spared: list[str], death: int) -> None:
    """Let this process kill itself before the first rename in a folder whose target is not spared; tell which."""

    def dying(rename: Any) -> Any:
        def renamed(source: Any, target: Any) -> None:
            # What the check only needs meanwhile has another name in every attempt, and no later run reads it.
            kept = Path(target).is_relative_to(folder) and ".scratch" not in Path(target).parts
            if kept and str(target) not in spared:
                os.write(death, os.fsencode(target))
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        return renamed

    os.rename, os.replace = dying(os.rename), dying(os.replace)


def attempt(work: Job, spared: list[str] | None) -> str | None:
    """Run in a forked process; return what it died before, or None when it came through.

    Args:
        spared: Targets that do not kill; None kills nowhere.
    """
    told, death = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if spared is not None:
                die_before_renames(work.work_dir, spared, death)
            run_to_the_report(pipeline_of(work))
            code = 0
        finally:
            os._exit(code)
    os.close(death)
    with os.fdopen(told) as pipe:
        target = pipe.read()
    _, status = os.waitpid(child, 0)
    if not (os.WIFSIGNALED(status) if target else os.WEXITSTATUS(status) == 0):
        sys.exit("an attempt failed by itself")
    return target or None


def main(model: Path, corpus: Path, whole: Path, killed: Path) -> None:
    """Make both runs."""
    import onnx  # noqa: F401 - this and the next one are imported once for all attempts
    import onnxruntime  # noqa: F401
    import torch

    torch.set_num_threads(1)  # the tiny products would wait for threads that other tests keep busy
    Decoder(open_checkpoint(str(model))).run(np.arange(8)[None])
    with pictures_left_blank():
        attempt(job(model, corpus, whole), None)
        deaths: list[str] = []
        while target := attempt(job(model, corpus, killed), deaths):
            deaths.append(target)
            print(Path(target).relative_to(killed), flush=True)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
