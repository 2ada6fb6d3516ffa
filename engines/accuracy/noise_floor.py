"""How far a bundle is from itself after a meaningless nudge: smaller differences between bundles mean nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spike_export.artifacts.progress import Progress, silent
from spike_export.artifacts.results.check_document import CheckNoise
from spike_export.engines.accuracy.comparison import Reference
from spike_export.engines.accuracy.cost import check_interval
from spike_export.engines.accuracy.distances import Accuracy, Distances, distances
from spike_export.engines.accuracy.intervals import Interval
from spike_export.engines.accuracy.predictions import predictions
from spike_export.engines.onnx_runtime.nudged_embeddings import open_nudged

NOISE_WINDOWS = 4
"""Evaluation windows at most: each is run twice."""

_NUDGE = 1e-6


def noise_floor(bundle: Path, reference: Reference, progress: Progress = silent) -> CheckNoise:
    """Run a bundle as it is, and with each channel of its embeddings a little larger or smaller.

    The nudge is relative, 1e-6, or one rounding of the embeddings' precision where that is larger. Which channels grow
    is drawn, the same way every time.

    Args:
        bundle: Folder that `export` wrote.
        reference: What the check compares the bundle with, and on which windows.
        progress: Told after each window.

    Raises:
        EngineError: The graph was changed, or ONNX Runtime cannot run the bundle.
    """
    nudged = open_nudged(bundle)
    nudge = max(_NUDGE, float(np.finfo(nudged.dtype).eps))
    scales = 1 + nudge * np.random.default_rng(0).choice([-1.0, 1.0], nudged.width)
    content = reference.content[:NOISE_WINDOWS]
    apart, before, behind = [], [], []
    for index, tokens in enumerate(content):
        plain, moved = nudged.logits(tokens), nudged.logits(tokens, scales)
        apart.append(distances(predictions(plain, tokens[1:]), moved, tokens[1:]))
        before.append(distances(reference.window(index), plain, tokens[1:]))
        behind.append(distances(reference.window(index), moved, tokens[1:]))
        progress("windows", index + 1, len(content))
    return _noise(nudge, Accuracy(tuple(apart)), before, behind)


def _noise(nudge: float, apart: Accuracy, before: Sequence[Distances], behind: Sequence[Distances]) -> CheckNoise:
    pairs = zip(behind, before, strict=True)
    change = np.array([after.divergence.mean() - earlier.divergence.mean() for after, earlier in pairs])
    return CheckNoise(
        nudge=nudge,
        windows=len(change),
        increase=check_interval(apart.increase),
        divergence=check_interval(apart.divergence),
        divergence_change=check_interval(Interval.of(change)),
        top1_agreement=check_interval(apart.top1_agreement),
    )
