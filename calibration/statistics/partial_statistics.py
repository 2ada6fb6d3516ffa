"""A calibration pass in parts, each stored when it is done, so that a killed pass goes on where it was."""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spike_export.artifacts.errors import ArtifactError, RecipeError
from spike_export.artifacts.progress import Progress, silent
from spike_export.calibration.statistics.description import load_description
from spike_export.calibration.statistics.spikes import (
    SpikeStatistics,
    load_spikes,
    merge_statistics,
    save_spikes,
)

Samples = NDArray[np.int64]

Measure = Callable[[Sequence[Samples]], Iterable[tuple[int, SpikeStatistics]]]
"""Measures parts of the samples: yields each one's number and statistics, in any order."""

_SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


def one_by_one(measure: Callable[[Samples], SpikeStatistics]) -> Measure:
    """Return what measures one part after another, in this process."""

    def measured(parts: Sequence[Samples]) -> Iterator[tuple[int, SpikeStatistics]]:
        for number, rows in enumerate(parts):
            yield number, measure(rows)

    return measured


def measure_in_parts(
    measure: Measure,
    samples: Samples,
    part_size: int,
    folder: Path,
    key: str,
    progress: Progress = silent,
) -> SpikeStatistics:
    """Measure samples part by part and return the merged record; parts of an earlier pass are taken over.

    Args:
        measure: Measures those parts that are not at hand.
        samples: Indices of the calibration's windows, ascending.
        part_size: Samples that a kill may cost.
        folder: Where parts are kept until the caller has stored the whole; `discard_parts` removes it.
        key: Stands for everything else that the statistics depend on; parts with another key are measured again.
        progress: Told after each part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [samples[start : start + part_size] for start in range(0, len(samples), part_size)]
    stems = [folder / f"{rows[0]:06}" for rows in parts]
    found: dict[int, SpikeStatistics] = {}

    def keep(number: int, part: SpikeStatistics) -> None:
        found[number] = part
        progress("windows", sum(len(parts[each]) for each in found), len(samples))

    for number, (stem, rows) in enumerate(zip(stems, parts, strict=True)):
        stored = _stored(stem, key, rows)
        if stored is not None:
            keep(number, stored)
    missing = [number for number in range(len(parts)) if number not in found]
    for place, part in measure([parts[number] for number in missing]):
        save_spikes(part, stems[missing[place]], {"key": key})
        keep(missing[place], part)
    return merge_statistics([found[number] for number in range(len(parts))])


def _stored(stem: Path, key: str, rows: Samples) -> SpikeStatistics | None:
    """Return a part of an earlier pass, or None where there is none that fits."""
    try:
        if load_description(stem).key != key:
            return None
        part = load_spikes(stem)
    except ArtifactError:
        return None
    return part if np.array_equal(part.sample_ids, rows) else None


def discard_parts(folder: Path) -> None:
    """Remove the parts of a pass that is stored as a whole."""
    shutil.rmtree(folder, ignore_errors=True)


def parse_shard(text: str) -> tuple[int, int]:
    """Read `i/n`, the i-th (from 1) of n shards.

    Raises:
        RecipeError: The text is not of that form.
    """
    found = _SHARD.fullmatch(text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= index <= count:
        raise RecipeError(f"--shard is {text!r}; expected the form 2/8: the second of eight")
    return index, count


def shard_samples(samples: int, shard: tuple[int, int]) -> Samples:
    """Return the indices of a shard's samples: every n-th.

    Raises:
        RecipeError: The shard has no sample.
    """
    index, count = shard
    chosen = np.arange(samples)[index - 1 :: count]
    if not len(chosen):
        raise RecipeError(f"--shard {index}/{count}: {samples} samples leave this shard empty; use fewer shards")
    return chosen


def merge_shards(stems: list[Path]) -> tuple[SpikeStatistics, dict[str, object]]:
    """Merge the statistics that shards stored, and return them with their common description.

    Raises:
        ArtifactError: A shard is missing, was taken of another model, corpus or options, or some windows are missing.
    """
    descriptions = [load_description(stem) for stem in stems]
    for stem, description in zip(stems, descriptions, strict=True):
        if description.key is None or description.key != descriptions[0].key:
            raise ArtifactError(
                f"{stem.parent}: model, corpus or options differ from those of {stems[0].parent}; calibrate "
                "all shards alike"
            )
    merged = merge_statistics([load_spikes(stem) for stem in stems])
    first = descriptions[0]
    if first.samples is None or first.model is None or first.corpus is None:
        raise ArtifactError(f"{stems[0]}.json: does not say of which calibration it is a part; calibrate again")
    total = first.samples
    missing = np.setdiff1d(np.arange(total), merged.sample_ids)
    if len(missing):
        raise ArtifactError(
            f"{len(missing)} of {total} windows are missing, the first is {missing[0]}; merge all shards"
        )
    return merged, first.model_dump(include={"key", "samples", "model", "corpus"})
