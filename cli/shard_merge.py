"""Brings the statistics of shards together in one work directory, where a run goes on from them."""

from collections.abc import Sequence
from pathlib import Path

from spike_export.calibration.errors import ArtifactError
from spike_export.calibration.partial_statistics import merge_shards
from spike_export.calibration.spikes import save_spikes
from spike_export.cli.run_directory import RunDirectory

STEM = "spikes"


def merge_into(work_dir: Path, shards: Sequence[Path]) -> int:
    """Write the merged statistics and mark their stage as done; return the number of windows.

    Raises:
        ArtifactError: A shard is missing, or does not belong to the others.
    """
    if not shards:
        raise ArtifactError("merge needs the work directories of the shards; give all of them")
    statistics, description = merge_shards([shard / STEM for shard in shards])
    run = RunDirectory(work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    run.begin(STEM)
    save_spikes(statistics, work_dir / STEM, description)
    run.mark_done(STEM, str(description["key"]))
    return len(statistics.sample_ids)
