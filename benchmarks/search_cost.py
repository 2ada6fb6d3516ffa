"""What the automatic search costs and finds, beside one calibration pass and beside the naive grid.

On SmolLM2-135M-Instruct with the main job's windows: seconds and forward tokens of the calibration pass, of the search
for prefix, smoothing and modules; then the grid of three strengths at norms, down_proj and o_proj (27 evaluations)
behind the same prefix. Perplexity and divergence are the search's own, on the held-out windows.
Run: python -m benchmarks.search_cost [--samples N] [--json FILE]
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.accuracy import JOB, job_calibration, table_calibration
from benchmarks.fetch_models import smollm2_path
from spike_export.calibration.calibrate import Calibration, Transform
from spike_export.calibration.checkpoint import open_checkpoint
from spike_export.calibration.module_choice import choose_kept
from spike_export.calibration.modules import input_sites
from spike_export.calibration.prefix_choice import choose_prefix
from spike_export.calibration.smoothing import (
    is_per_value_head,
    shared_by_group,
    smoothing_plan,
    smoothing_scales,
)
from spike_export.calibration.spikes import SpikeStatistics
from spike_export.calibration.transform_choice import choose_transform

STRENGTHS = (0.5, 0.65, 0.8)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """One step: its seconds, its tokens through the whole model, and what it ended at on the held-out windows."""

    step: str
    seconds: float
    forward_tokens: int
    perplexity: float | None = None
    divergence: float | None = None


def measured(calibration: Calibration, step: str, work: Callable[[], Result]) -> tuple[Result, Cost]:
    """Run a step and count."""
    before, started = calibration.meter.tokens, time.perf_counter()
    result = work()
    return result, Cost(step, time.perf_counter() - started, calibration.meter.tokens - before)


def grid(calibration: Calibration, statistics: SpikeStatistics) -> Iterator[Transform]:
    """Yield every combination of strengths: norms, down_proj, o_proj, the same in all layers."""
    config = calibration.checkpoint.config
    for norms, down, attention in itertools.product(STRENGTHS, repeat=3):
        plans = {}
        for index in range(config.num_hidden_layers):
            for site in input_sites(config):
                name = f"model.layers.{index}.{site.representative}"
                readers = [f"model.layers.{index}.{reader}" for reader in site.readers]
                inputs = statistics.modules[name].channel_amax
                weights = np.max([calibration.column_amax(reader) for reader in readers], axis=0)
                strength = norms if site.behind_norm else down
                if is_per_value_head(site):
                    strength = attention
                    inputs, weights = (shared_by_group(each, config) for each in (inputs, weights))
                scales = smoothing_scales("smoothquant", strength, inputs, weights)
                plans[name] = smoothing_plan("smoothquant", strength, scales)
        yield Transform(smoothing=plans)


def costs(calibration: Calibration) -> Iterator[Cost]:
    """Run all steps, and yield each one's cost when it is done."""
    calibration.model.decoder.run(calibration.fed(calibration.search_windows[:1], ()))  # reads the weights
    plain, first = measured(calibration, "calibration pass", lambda: calibration.measure(()))
    yield first
    prefix, second = measured(calibration, "prefix", lambda: choose_prefix(calibration, plain))
    yield second
    behind = calibration.measure(prefix.token_ids)
    calibration.reference(prefix.token_ids)
    choice, third = measured(calibration, "smoothing", lambda: choose_transform(calibration, behind))
    score = choice.candidates[0]
    yield Cost(third.step, third.seconds, third.forward_tokens, score.perplexity, score.divergence)
    after = calibration.measure(prefix.token_ids, choice.transform)
    _, fourth = measured(calibration, "modules", lambda: choose_kept(calibration, after, choice.transform))
    yield fourth
    scores, fifth = measured(
        calibration,
        f"naive grid of {len(STRENGTHS) ** 3} smoothings",
        lambda: [calibration.predicted(behind, (), each) for each in grid(calibration, behind)],
    )
    best = min(scores, key=lambda each: each.divergence)
    yield Cost(fifth.step, fifth.seconds, fifth.forward_tokens, best.perplexity, best.divergence)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--samples", type=int, default=JOB.samples, help="calibration windows")
    given = parser.parse_args(arguments)
    job = job_calibration(table_calibration(open_checkpoint(str(smollm2_path()))), given.samples)
    found: list[Cost] = []
    for cost in costs(Calibration(job.checkpoint, job.windows, job.options)):
        found.append(cost)
        ended = "" if cost.perplexity is None else f"perplexity {cost.perplexity:.3f}, divergence {cost.divergence:.4f}"
        ratio = cost.seconds / found[0].seconds
        print(
            f"{cost.step:32s} {cost.seconds:7.1f} s {ratio:6.2f} x {cost.forward_tokens:8,d} tokens  {ended}",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(cost) for cost in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
