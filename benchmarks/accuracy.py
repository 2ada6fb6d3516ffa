"""Perplexity of SmolLM2-135M-Instruct under each method, in ONNX Runtime, on fixed windows.

Calibration: 8 windows of 511 tokens of the default corpus at tokens 0, 4,500, 9,000, ...; evaluation: 8 windows at
60,000, 63,000, ...; what is not quantized is float32. Run: python -m benchmarks.accuracy [--json FILE]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.fetch_models import smollm2_path
from spike_export.calibration import qfem
from spike_export.calibration.calibrate import (
    Calibration,
    CalibrationOptions,
    PrefixChoice,
    build_recipe,
    choose_kept,
    choose_prefix,
)
from spike_export.calibration.checkpoint import Checkpoint, open_checkpoint
from spike_export.calibration.corpus import default_corpus
from spike_export.calibration.qfem import ModuleChoice
from spike_export.calibration.recipe import ActivationRange, Recipe
from spike_export.calibration.spikes import SpikeStatistics
from spike_export.calibration.token_windows import TokenWindows, token_windows, windows_at
from spike_export.engines.check_document import Check
from spike_export.engines.variants import Variant, check_variants
from spike_export.export.bundle import ExportOptions

CONTENT = 511
CALIBRATION_STARTS = np.arange(0, 36_000, 4_500)
NOTHING_KEPT = ModuleChoice(alpha=float("inf"), kept=())


def table_calibration(checkpoint: Checkpoint) -> Calibration:
    """Return the model with the table's windows."""
    corpus = default_corpus()
    assert checkpoint.tokenizer is not None
    encoded = checkpoint.tokenizer.backend_tokenizer.encode(corpus.text, add_special_tokens=False).ids
    evaluation = token_windows(corpus, checkpoint.tokenizer, 8, CONTENT, 0).evaluation
    content = windows_at(np.asarray(encoded, np.int64), CALIBRATION_STARTS, CONTENT)
    options = CalibrationOptions(samples=8, length=CONTENT + 1, dtype="float32", activation_range="max")
    return Calibration(checkpoint, TokenWindows(content, evaluation), options)


class Table:
    """Collects the rows; statistics behind a prefix are measured once."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.statistics: dict[tuple[int, ...], SpikeStatistics] = {}
        self.rows: list[Variant] = [Variant("FP32", None)]

    def behind(self, prefix: tuple[int, ...]) -> SpikeStatistics:
        if prefix not in self.statistics:
            self.statistics[prefix] = self.calibration.measure(prefix)
        return self.statistics[prefix]

    def fixed(self, name: str, prefix: tuple[int, ...], kept: int) -> None:
        """Add a row with the given prefix and the `kept` linears of the highest ratios, scales as in the paper."""
        statistics = self.behind(prefix)
        choice = qfem.keep_highest(statistics.ratios(), kept) if kept else NOTHING_KEPT
        self.rows.append(Variant(name, build_recipe(self.calibration, default_corpus(), statistics, choice)))

    def automatic(self, name: str, max_linears: int | None, rule: ActivationRange) -> None:
        """Add a row in which prefix and modules are chosen."""
        options = replace(self.calibration.options, max_fp16_modules=max_linears, activation_range=rule)
        recipe = self._chosen(self.calibration.with_options(options))
        text = recipe.prefix.text if recipe.prefix else ""
        print(f"{name}: {len(recipe.kept())} kept, prefix {list(recipe.prefix_ids)} {text!r}", flush=True)
        self.rows.append(Variant(name, recipe))

    def _chosen(self, calibration: Calibration) -> Recipe:
        prefixes: PrefixChoice = choose_prefix(calibration, self.behind(()))
        statistics = self.behind(prefixes.token_ids)
        return build_recipe(calibration, default_corpus(), statistics, choose_kept(calibration, statistics))


def measure(checkpoint: Checkpoint) -> Check:
    """Return all rows, evaluated."""
    calibration = table_calibration(checkpoint)
    table = Table(calibration)
    bos = checkpoint.bos_token_id
    assert bos is not None
    table.fixed("W8A8", (), 0)
    for kept in (4, 10, 30):
        table.fixed(f"W8A8 + QFeM, {kept} linears", (), kept)
    table.fixed("W8A8 + QFeP [BOS]", (bos,), 0)
    for kept in (4, 10):
        table.fixed(f"W8A8 + QFeP [BOS] + QFeM, {kept} linears", (bos,), kept)
    rules: tuple[ActivationRange, ...] = ("max", "sample-mean")
    for rule in rules:
        for most in (4, 10, None):
            budget = "no budget" if most is None else f"--max-fp16-modules {most}"
            table.automatic(f"automatic, {budget}, range {rule}", most, rule)
    content = calibration.windows.evaluation
    return check_variants(
        checkpoint, lambda: calibration.model, default_corpus(), content, table.rows, ExportOptions("float32")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="another checkpoint than SmolLM2's GGUF file")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    arguments = parser.parse_args()
    check = measure(open_checkpoint(arguments.model or str(smollm2_path())))
    print(f"transformers, float32: {check.reference.perplexity:.3f}")
    for row in check.variants:
        print(
            f"{row.name:50s} {row.perplexity:8.3f} {100 * (row.increase or 0):+8.2f} %  top-1 "
            f"{100 * (row.top1_agreement or 0):6.2f} %  KL {row.kl_divergence:.4f}  kept {row.kept_linears}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(check.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
