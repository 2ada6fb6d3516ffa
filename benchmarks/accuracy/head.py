"""What a quantized head costs in perplexity, in ONNX Runtime and as the simulation predicts it.

Three decoders (unquantized; static W8A8, smoothed with fixed strengths; W8A8 per token; the latter two behind the
prefix [BOS]) times four heads. With --nudges, INT8 decoders are instead repeated both ways with embeddings that differ
in their last bits, to tell what a head costs from what the rounding of 30 layers makes of nothing.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.table import simulated_perplexity
from benchmarks.fetch_models import smollm2_path
from spike_export.artifacts.recipe import SMOOTHED_HEAD, HeadScheme, Recipe, SmoothingPlan
from spike_export.calibration.corpus.corpus import Corpus, default_corpus
from spike_export.calibration.corpus.token_windows import token_windows
from spike_export.calibration.decoder.perplexity import Likelihood
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.module_choice import NOTHING_KEPT
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.smoothing_search import default_smoothing
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, TensorSource
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.accuracy.distances import likelihood
from spike_export.engines.accuracy.variants import Variant, check_variants
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.export.bundle import ExportOptions, export_bundle

NUDGE = 1e-6
"""Relative size of the noise on the embeddings: a few units in float32's last place."""

_HEADS: Mapping[str, tuple[HeadScheme, bool]] = {
    "unquantized": ("unquantized", False),
    "int8-weights": ("int8-weights", False),
    "int8-per-token-dynamic": (SMOOTHED_HEAD, False),
    "int8-per-token-dynamic, smoothed": (SMOOTHED_HEAD, True),
}


def recipes(calibration: Calibration, corpus: Corpus) -> dict[str, Recipe]:
    """Return the name of every decoder with every head → its recipe."""
    bos = calibration.checkpoint.bos_token_id
    prefix = () if bos is None else (bos,)
    statistics_behind = calibration.measure(prefix)
    plain = build_recipe(calibration, corpus, statistics_behind, NOTHING_KEPT)
    config = calibration.checkpoint.config
    smoothing = default_smoothing(statistics_behind, config, calibration.column_amax, rotated=False)
    transform = Transform(smoothing=smoothing)
    after = calibration.measure(prefix, transform)
    per_token = {name: plan.model_copy(update={"activations": "per-token"}) for name, plan in plain.modules.items()}
    kept = {name: plan.model_copy(update={"precision": "float32"}) for name, plan in per_token.items()}
    decoders = {
        "float32": plain.model_copy(update={"modules": kept, "prefix": None}),
        "W8A8, smoothed": build_recipe(calibration, corpus, after, NOTHING_KEPT, transform),
        "W8A8 per token": plain.model_copy(update={"modules": per_token}),
    }
    rounding = calibration.with_options(replace(calibration.options, head=SMOOTHED_HEAD))
    chosen = rounding.head_smoothing(None)
    for each in chosen.candidates:
        print(f"head alone, {each.name:24} KL {each.divergence:.5f}  {each.verdict}")
    return {
        f"{name}, head {label}": _with_head(recipe, scheme, chosen.plan if smoothed else None)
        for name, recipe in decoders.items()
        for label, (scheme, smoothed) in _HEADS.items()
    }


def _with_head(recipe: Recipe, head: HeadScheme, smoothing: SmoothingPlan | None) -> Recipe:
    scheme = recipe.scheme.model_copy(update={"head": head})
    return recipe.model_copy(update={"scheme": scheme, "head_smoothing": smoothing})


def lines(calibration: Calibration, corpus: Corpus, found: Mapping[str, Recipe]) -> list[str]:
    """Evaluate every recipe both ways; return one line for each."""
    check = check_variants(
        calibration.checkpoint,
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
            f"{variant.name:54} {variant.perplexity:9.4f}  simulated {predicted:9.4f}"
            f" ({predicted / variant.perplexity - 1:+.3%})  top-1 {variant.top1_agreement:.2%}"
            f"  KL {variant.kl_divergence:.5f}"
        )
    return rows


@dataclass(frozen=True)
class NudgedTensors:
    """A `TensorSource` whose embedding, and the head that is tied to it, bear noise of `NUDGE`."""

    original: TensorSource
    seed: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """HF tensor name → shape."""
        return self.original.shapes

    def sha256(self) -> str:
        """Hash of the stored files, to which recipes refer."""
        return self.original.sha256()

    def read(self, name: str) -> NDArray[np.float32]:
        """Read one tensor, with its noise where it has some."""
        tensor = self.original.read(name)
        if name not in (EMBEDDING, LM_HEAD):
            return tensor
        noise = np.random.default_rng(self.seed).standard_normal(tensor.shape, np.float32)
        return np.asarray(tensor * (1 + np.float32(NUDGE) * noise), np.float32)


def nudged_line(calibration: Calibration, name: str, recipe: Recipe, nudges: int) -> str:
    """Return mean and standard deviation of both perplexities over several nudged models."""
    simulated, shown = [], []
    for seed in range(nudges):
        checkpoint = replace(calibration.checkpoint, tensors=NudgedTensors(calibration.checkpoint.tensors, seed))
        simulated.append(
            simulated_perplexity(Calibration(checkpoint, calibration.windows, calibration.options), recipe)
        )
        shown.append(_onnx_perplexity(checkpoint, recipe, calibration.windows.evaluation))
    both = (f"{statistics.mean(each):9.4f} (sd {statistics.stdev(each):.4f})" for each in (shown, simulated))
    return f"{name:54} {'  simulated '.join(both)} ({statistics.mean(simulated) / statistics.mean(shown) - 1:+.3%})"


def _onnx_perplexity(checkpoint: Checkpoint, recipe: Recipe, content: NDArray[np.int64]) -> float:
    total = Likelihood(0.0, 0)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(checkpoint, recipe, ExportOptions("float32"), bundle)
        session = open_bundle(bundle)
        for tokens in content:
            total += likelihood(session.prefill(tokens[None])[0, :-1], tokens[1:])
    return total.perplexity


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="HF directory or .gguf file; SmolLM2-135M-Instruct without")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--windows", type=int, help="evaluate on the first so many windows only")
    parser.add_argument("--nudges", type=int, default=0, help="repeat with so many nudged embeddings, 2 or more")
    given = parser.parse_args(arguments)
    checkpoint, corpus = open_checkpoint(given.model or str(smollm2_path())), default_corpus()
    options = CalibrationOptions(samples=given.samples, dtype="float32")
    windows = token_windows(corpus, checkpoint.tokenizer, options.samples, options.length - 1, options.seed)
    windows = replace(windows, evaluation=windows.evaluation[: given.windows])
    print(f"{checkpoint.name}: {windows.evaluation.shape[0]} windows of {windows.evaluation.shape[1]} tokens")
    calibration = Calibration(checkpoint, windows, options)
    found = recipes(calibration, corpus)
    if not given.nudges:
        for line in lines(calibration, corpus, found):
            print(line)
        return
    print(f"means over {given.nudges} models whose embeddings differ by {NUDGE:g}:")
    for name, recipe in found.items():
        if not name.startswith("float32") and not name.endswith("int8-weights"):
            print(nudged_line(calibration, name, recipe, given.nudges), flush=True)


if __name__ == "__main__":
    main()
