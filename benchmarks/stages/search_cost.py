"""What the automatic search costs and finds, beside one calibration pass and beside the naive grid.

On SmolLM2-135M-Instruct with the main job's windows: seconds and forward tokens of the calibration pass, of the search
for prefix, smoothing and modules; then the grid of three strengths at norms, down_proj and o_proj (27 evaluations)
behind the same prefix. Both compare on the held-out windows with scales of the other ones, and both make the winner's
scales of all windows. Perplexity and divergence are those of the winner on evaluation windows that neither saw, with
every linear in INT8 (in brackets the divergence it was chosen by).
Run: python -m benchmarks.stages.search_cost [--samples N] [--json FILE]
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.table import JOB, job_calibration, table_calibration
from benchmarks.fetch_models import smollm2_path
from spike_export.calibration.decoder.equivalent.smoothing import (
    is_per_value_head,
    shared_by_group,
    smoothing_plan,
    smoothing_scales,
)
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.module_choice import choose_kept
from spike_export.calibration.methods.prefix_choice import choose_prefix
from spike_export.calibration.methods.transform_choice import choose_transform
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.modules import input_sites
from spike_export.checkpoint.opening import open_checkpoint

STRENGTHS = (0.5, 0.65, 0.8)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """One step: its seconds, its tokens through the whole model, and what it ended at.

    Attributes:
        chosen_by: Divergence on the held-out windows, by which the winner was chosen.
        perplexity, divergence: The winner's on the evaluation windows.
    """

    step: str
    seconds: float
    forward_tokens: int
    chosen_by: float | None = None
    perplexity: float | None = None
    divergence: float | None = None


class Unseen(Calibration):
    """Compares on the evaluation windows."""

    @property
    def search_windows(self) -> NDArray[np.int64]:
        """[windows, tokens] The evaluation's."""
        return self.windows.evaluation

    @classmethod
    def of(cls, calibration: Calibration) -> "Unseen":
        """Return the same model; its weights are shared."""
        unseen = cls(calibration.checkpoint, calibration.windows, calibration.options)
        unseen.__dict__["model"] = calibration.model
        return unseen


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
    calibration.reference_perplexity(prefix.token_ids)
    choice, third = measured(calibration, "smoothing", lambda: choose_transform(calibration, behind))
    unseen = Unseen.of(calibration)

    def ended(cost: Cost, chosen_by: float, transform: Transform) -> Cost:
        found = unseen.predicted(behind, (), transform)
        return replace(cost, chosen_by=chosen_by, perplexity=found.perplexity, divergence=found.divergence)

    yield ended(third, choice.candidates[0].divergence, choice.transform)
    after = calibration.measure(prefix.token_ids, choice.transform)
    _, fourth = measured(
        calibration,
        "modules",
        lambda: choose_kept(calibration, after, choice.transform),
    )
    yield fourth
    held_out = calibration.held_out(behind)
    scores, fifth = measured(
        calibration,
        f"naive grid of {len(STRENGTHS) ** 3} smoothings",
        lambda: [calibration.predicted(held_out, (), each).divergence for each in grid(calibration, held_out)],
    )
    best = int(np.argmin(scores))
    yield ended(fifth, scores[best], list(grid(calibration, behind))[best])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--samples", type=int, default=JOB.samples, help="calibration windows")
    given = parser.parse_args(arguments)
    job = job_calibration(table_calibration(open_checkpoint(str(smollm2_path()))), given.samples)
    found: list[Cost] = []
    options = replace(job.options, activations="static")  # as the grid's
    for cost in costs(Calibration(job.checkpoint, job.windows, options)):
        found.append(cost)
        ended = ""
        if cost.perplexity is not None:
            ended = f"perplexity {cost.perplexity:.3f}, divergence {cost.divergence:.4f} ({cost.chosen_by:.4f})"
        ratio = cost.seconds / found[0].seconds
        print(
            f"{cost.step:32s} {cost.seconds:7.1f} s {ratio:6.2f} x {cost.forward_tokens:8,d} tokens  {ended}",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps([asdict(cost) for cost in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
