"""Brings the statistics of shards together in one work directory, where a run goes on from them."""

from collections.abc import Sequence
from pathlib import Path

from spike_export.artifacts.errors import ArtifactError
from spike_export.calibration.statistics.description import load_description
from spike_export.calibration.statistics.partial_statistics import merge_shards as merged_statistics
from spike_export.calibration.statistics.spikes import save_spikes
from spike_export.pipeline.run_directory import RunDirectory

STEM = "spikes"


def merge_shards(shards: Sequence[Path | str], work_dir: Path | str) -> int:
    """Write the statistics of all windows, from which `calibrate` goes on; return the number of windows.

    Args:
        shards: Work directories that `measure_shard` wrote, all of them, in any order.
        work_dir: Where the statistics go, for `calibrate` with the same model, corpus and options.

    Raises:
        ArtifactError: A shard is missing, or does not belong to the others; or the work directory is in use.
    """
    if not shards:
        raise ArtifactError("merge needs the work directories of the shards; give all of them")
    work_dir = Path(work_dir)
    stems = [Path(shard) / STEM for shard in shards]
    statistics, description = merged_statistics(stems)
    texts = _token_texts(stems)
    run = RunDirectory(work_dir)
    with run.sole_writer():
        run.begin(STEM)
        save_spikes(statistics, work_dir / STEM, description, lambda token: texts.get(token, ""))
        run.mark_done(STEM, str(description["key"]))
    return len(statistics.sample_ids)


def _token_texts(stems: Sequence[Path]) -> dict[int, str]:
    """Return the texts of the shards' largest tokens, among which those of the whole are: the tokenizer is not here."""
    return {
        token.token_id: token.text
        for stem in stems
        for module in load_description(stem).modules.values()
        for token in module.top_tokens
    }
