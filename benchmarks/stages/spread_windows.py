"""How much faster the windows of a calibration are measured by workers of a Ray cluster on this machine.

One process with one thread, then N workers with one thread each; the first pass over the windows alone, model loading
included. The statistics are compared.
Run: python -m benchmarks.stages.spread_windows [--model PATH] [--samples N] [--length N] [--workers N ...]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.fetch_models import smollm2_path
from spike_export.calibration.corpus.files import HELP_TOPICS, CorpusOptions
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.pipeline.cluster.cluster_options import ClusterOptions
from spike_export.pipeline.job import Job
from spike_export.pipeline.opening import open_pipeline
from spike_export.pipeline.stage_display import StageCallback


def measured(model: str, options: CalibrationOptions, cluster: ClusterOptions | None) -> tuple[float, bytes]:
    """Return the seconds of the first pass without connecting to the cluster, and the file of its statistics."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(model, Path(folder), calibration=options, corpus=CorpusOptions(HELP_TOPICS), cluster=cluster)
        with open_pipeline(job, StageCallback()) as pipeline:
            _ = pipeline.windows
            begun = time.perf_counter()
            pipeline.measure()
            seconds = time.perf_counter() - begun
        return seconds, (Path(folder) / "spikes.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's path; SmolLM2 by default")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="AUTO,STRICT")
    calibration = CalibrationOptions(samples=options.samples, length=options.length)
    model = options.model or str(smollm2_path())
    alone, expected = measured(model, calibration, None)
    print(f"one process: {alone:.1f} s", flush=True)
    for workers in options.workers:
        seconds, found = measured(model, calibration, ClusterOptions(address="local", workers=workers))
        same = "the same bytes" if found == expected else "OTHER BYTES"
        print(f"{workers} workers: {seconds:.1f} s, {alone / seconds:.2f} x, {same}", flush=True)


if __name__ == "__main__":
    main()
