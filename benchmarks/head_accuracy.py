"""What a quantized head costs in perplexity, in ONNX Runtime and as the simulation predicts it.

Three decoders (unquantized, static W8A8, W8A8 per token, the latter two behind the prefix [BOS]) times three heads.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from benchmarks.accuracy import simulated_perplexity
from benchmarks.fetch_models import smollm2_path
from spike_export.calibration.calibrate import Calibration
from spike_export.calibration.checkpoint import Checkpoint, open_checkpoint
from spike_export.calibration.corpus import Corpus, default_corpus
from spike_export.calibration.module_choice import NOTHING_KEPT
from spike_export.calibration.options import CalibrationOptions
from spike_export.calibration.recipe import HeadScheme, Recipe
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.token_windows import token_windows
from spike_export.engines.variants import Variant, check_variants
from spike_export.export.bundle import ExportOptions


def recipes(calibration: Calibration, corpus: Corpus) -> dict[str, Recipe]:
    """Return the name of every decoder with every head → its recipe."""
    bos = calibration.checkpoint.bos_token_id
    prefix = () if bos is None else (bos,)
    static = build_recipe(calibration, corpus, calibration.measure(prefix), NOTHING_KEPT)
    per_token = {name: plan.model_copy(update={"activation_scale": None}) for name, plan in static.modules.items()}
    kept = {name: plan.model_copy(update={"precision": "float32"}) for name, plan in per_token.items()}
    dynamic = static.scheme.model_copy(update={"activations": "int8-per-token-dynamic"})
    decoders = {
        "float32": static.model_copy(update={"modules": kept, "prefix": None}),
        "W8A8": static,
        "W8A8 per token": static.model_copy(update={"modules": per_token, "scheme": dynamic}),
    }
    heads: tuple[HeadScheme, ...] = get_args(HeadScheme)
    return {
        f"{name}, head {head}": recipe.model_copy(update={"scheme": recipe.scheme.model_copy(update={"head": head})})
        for name, recipe in decoders.items()
        for head in heads
    }


def lines(checkpoint: Checkpoint, calibration: Calibration, corpus: Corpus) -> list[str]:
    """Evaluate every recipe both ways; return one line for each."""
    found = recipes(calibration, corpus)
    check = check_variants(
        checkpoint,
        lambda: calibration.model.decoder,
        corpus,
        calibration.windows.evaluation,
        [Variant(name, recipe) for name, recipe in found.items()],
        ExportOptions("float32"),
    )
    rows = []
    for variant in check.variants:
        predicted = simulated_perplexity(calibration, found[variant.name])
        rows.append(
            f"{variant.name:44} {variant.perplexity:9.4f}  simulated {predicted:9.4f}"
            f" ({predicted / variant.perplexity - 1:+.3%})  top-1 {variant.top1_agreement:.2%}"
            f"  KL {variant.kl_divergence:.5f}"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--samples", type=int, default=4, help="calibration windows")
    parser.add_argument("--windows", type=int, help="evaluate on the first so many windows only")
    given = parser.parse_args(arguments)
    checkpoint, corpus = open_checkpoint(given.model or str(smollm2_path())), default_corpus()
    options = CalibrationOptions(samples=given.samples, dtype="float32")
    windows = token_windows(corpus, checkpoint.tokenizer, options.samples, options.length - 1, options.seed)
    windows = replace(windows, evaluation=windows.evaluation[: given.windows])
    print(f"{checkpoint.name}: {windows.evaluation.shape[0]} windows of {windows.evaluation.shape[1]} tokens")
    for line in lines(checkpoint, Calibration(checkpoint, windows, options), corpus):
        print(line)


if __name__ == "__main__":
    main()
