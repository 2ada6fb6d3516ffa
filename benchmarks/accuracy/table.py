"""Perplexity of a real model under each method, on fixed windows of the help topics.

The paper's rows calibrate on 8 windows of 511 tokens at tokens 0, 4,500, 9,000, ..., the automatic ones on the main
job's 32; evaluation: 8 windows at 60,000, 63,000, ...; what is not quantized is float32. The bundles run in ONNX
Runtime.
Run: python -m benchmarks.accuracy [--model PATH|gemma3] [--windows N] [--json FILE]
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.fetch_models import MODELS, model_path
from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import ActivationRange, Recipe, Search
from spike_export.calibration.corpus.corpus import Corpus, default_corpus
from spike_export.calibration.corpus.token_windows import TokenWindows, token_windows, windows_at
from spike_export.calibration.decoder.equivalent.smoothing import is_per_value_head
from spike_export.calibration.decoder.perplexity import model_perplexity
from spike_export.calibration.decoder.simulate import Simulation
from spike_export.calibration.methods.activation_choice import choose_measured_activations
from spike_export.calibration.methods.context import Calibration, Transform
from spike_export.calibration.methods.module_choice import NOTHING_KEPT, choose_kept
from spike_export.calibration.methods.options import CalibrationOptions
from spike_export.calibration.methods.prefix_choice import PrefixChoice, choose_prefix
from spike_export.calibration.methods.qfem import ModuleChoice, Scores, mac_shares
from spike_export.calibration.methods.smoothing_search import default_smoothing
from spike_export.calibration.methods.transform_choice import TransformChoice, choose_transform
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.spikes import SpikeStatistics
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.modules import InputSite, input_sites, is_router, linears, representatives, split_name
from spike_export.checkpoint.opening import open_checkpoint
from spike_export.engines.accuracy.variants import Variant, check_variants
from spike_export.export.bundle import ExportOptions

CONTENT = 511
CALIBRATION_STARTS = np.arange(0, 36_000, 4_500)
PAPER = CalibrationOptions(
    samples=len(CALIBRATION_STARTS), length=CONTENT + 1, dtype="float32", activation_range="max", smoothing=False
)
JOB = CalibrationOptions(length=CONTENT + 1, dtype="float32")


def table_calibration(checkpoint: Checkpoint) -> Calibration:
    """Return the model with the windows and options of the paper's rows."""
    corpus = default_corpus()
    assert checkpoint.tokenizer is not None
    encoded = checkpoint.tokenizer.backend_tokenizer.encode(corpus.text, add_special_tokens=False).ids
    content = windows_at(np.asarray(encoded, np.int64), CALIBRATION_STARTS, CONTENT)
    windows = token_windows(corpus, checkpoint.tokenizer, len(content), CONTENT, 0)
    return Calibration(checkpoint, TokenWindows(content, windows.evaluation), PAPER)


def job_calibration(table: Calibration, samples: int = JOB.samples) -> Calibration:
    """Return the same model with the windows and options of the main job; the evaluation's are the table's."""
    options = replace(JOB, samples=samples)
    windows = token_windows(default_corpus(), table.checkpoint.tokenizer, samples, CONTENT, JOB.seed)
    calibration = Calibration(table.checkpoint, replace(windows, evaluation=table.windows.evaluation), options)
    calibration.__dict__["model"] = table.model  # one copy of the weights serves both
    return calibration


def simulated_perplexity(calibration: Calibration, recipe: Recipe | None) -> float:
    """Return the perplexity of a recipe on the evaluation windows, simulated in torch; None quantizes nothing."""
    content = calibration.windows.evaluation
    if recipe is None:
        return unquantized_perplexity(calibration, ())
    model = calibration.transformed(Transform.of(recipe))
    simulation = Simulation(recipe.modules, model.quantized, recipe.attention)
    fed = calibration.fed(content, recipe.prefix_ids)
    return model_perplexity(
        model.decoder,
        fed,
        content.shape[1],
        recipe.prefix_ids,
        (simulation.visit,),
        head=recipe.scheme.head,
        head_smoothing=recipe.head_smoothing,
    )


def unquantized_perplexity(calibration: Calibration, prefix: tuple[int, ...]) -> float:
    """Return the perplexity of the model itself behind a prefix, on the evaluation windows."""
    content = calibration.windows.evaluation
    return model_perplexity(calibration.model.decoder, calibration.fed(content, prefix), content.shape[1], prefix)


def automatic_recipe(
    calibration: Calibration, corpus: Corpus | None = None, prefix: tuple[int, ...] | None = None
) -> Recipe:
    """Return what the main job chooses; with a given prefix, what it chooses behind that."""
    prefixes = PrefixChoice(prefix) if prefix else choose_prefix(calibration, calibration.measure(()))
    behind = calibration.measure(prefixes.token_ids)
    if calibration.options.searches_smoothing:
        chosen = choose_transform(calibration, behind)
    else:
        chosen = TransformChoice(kinds=choose_measured_activations(calibration, behind))
    transform, kinds = chosen.transform, chosen.kinds
    after = calibration.measure(behind.prefix_ids, transform) if transform.changes_weights else behind
    choice = choose_kept(calibration, after, transform, per_token=kinds.per_token)
    search = Search(
        reference_perplexity=calibration.reference_perplexity(prefixes.token_ids),
        plain_reference_perplexity=calibration.reference_perplexity(()),
        transforms=chosen.candidates,
        activations=kinds.candidates,
        curve=choice.curve,
        prefixes=prefixes.candidates,
    )
    return build_recipe(calibration, corpus or default_corpus(), after, choice, transform, search, kinds.per_token)


@dataclass(frozen=True)
class Row:
    """One method's figures.

    Attributes:
        increase: Of the perplexity, as a fraction of the unquantized model's without a prefix.
        top1_agreement: Share of positions with the unquantized model's most likely token.
        kl_divergence: From the unquantized model, per token in nats.
        kept_linears: Linears that are not quantized.
        mac_share: Share of the linears' multiply-accumulates that run in 8 bits.
        prefix: Token ids.
        behind_prefix: Perplexity of the unquantized model behind the same prefix; None without one.
    """

    name: str
    perplexity: float
    increase: float
    top1_agreement: float
    kl_divergence: float
    kept_linears: int
    mac_share: float
    prefix: tuple[int, ...]
    behind_prefix: float | None


@dataclass
class Table:
    """Collects the recipes; statistics are measured once for each prefix."""

    calibration: Calibration
    corpus: Corpus
    recipes: dict[str, Recipe | None] = field(default_factory=lambda: {"FP32": None})
    _statistics: dict[tuple[int, ...], SpikeStatistics] = field(default_factory=dict)

    def behind(self, prefix: tuple[int, ...]) -> SpikeStatistics:
        if prefix not in self._statistics:
            self._statistics[prefix] = self.calibration.measure(prefix)
        return self._statistics[prefix]

    def weights_only(self, name: str) -> None:
        """Add a row in which the weights of all linears are INT8, and nothing else is."""
        calibration = self.calibration.with_options(replace(PAPER, excluded_weights="int8"))
        names = representatives(calibration.checkpoint.config)
        everything = ModuleChoice(alpha=0.0, kept=tuple(each for each in names if not is_router(each)))
        self.recipes[name] = build_recipe(calibration, self.corpus, self.behind(()), everything)

    def fixed(self, name: str, prefix: tuple[int, ...], kept: int) -> None:
        """Add a row with the given prefix and the `kept` linears of the highest ratios, scales as in the paper."""
        statistics = self.behind(prefix)
        scores = Scores.sorted("ratio", statistics.ratios(), self.calibration.checkpoint.config)
        choice = scores.keep_highest(kept) if kept else NOTHING_KEPT
        self.recipes[name] = build_recipe(self.calibration, self.corpus, statistics, choice)

    def smoothed(self, prefix: tuple[int, ...]) -> None:
        """Add the ablation of smoothing: where, and with what strength; nothing is kept."""
        config, statistics = self.calibration.checkpoint.config, self.behind(prefix)
        everywhere = default_smoothing(statistics, config, self.calibration.column_amax, rotated=False)
        step_of = {site.representative: _step(site) for site in input_sites(config)}
        for step, name in enumerate(SMOOTHING_STEPS):
            plans = {module: plan for module, plan in everywhere.items() if step_of[split_name(module)[1]] <= step}
            self._transformed(f"QFeP [BOS], smoothing of {name}", self.calibration, prefix, Transform(smoothing=plans))

    def searched(self, job: Calibration, prefix: tuple[int, ...]) -> None:
        """Add the main job's search behind a given prefix, for two rules of what a scale covers; nothing is kept."""
        statistics = job.measure(prefix)
        rules: tuple[ActivationRange, ...] = ("max", "mse", "sample-mean")
        for rule in rules:
            calibration = job.with_options(replace(job.options, activation_range=rule))
            transform = choose_transform(calibration, statistics).transform
            self._transformed(f"QFeP [BOS], searched smoothing, range {rule}", calibration, prefix, transform)

    def _transformed(self, name: str, calibration: Calibration, prefix: tuple[int, ...], transform: Transform) -> None:
        after = calibration.measure(prefix, transform)
        self.recipes[name] = build_recipe(calibration, self.corpus, after, NOTHING_KEPT, transform)

    def automatic(self, name: str, calibration: Calibration, prefix: tuple[int, ...] | None = None) -> None:
        """Add a row in which everything is chosen, or everything but the prefix."""
        recipe = automatic_recipe(calibration, self.corpus, prefix)
        text = recipe.prefix.text if recipe.prefix else ""
        print(f"{name}: {len(recipe.kept_linears())} kept, prefix {list(recipe.prefix_ids)} {text!r}", flush=True)
        self.recipes[name] = recipe


BUDGET = 6
"""Linears in 16 bit that one of the automatic rows may keep."""

SMOOTHING_STEPS = ("norms 0.65", "norms, down_proj 0.65", "norms, down_proj 0.65, o_proj 0.5")


def _step(site: InputSite) -> int:
    """Return from which of the steps on an input is smoothed."""
    if is_per_value_head(site):
        return 2
    return 0 if site.behind_norm else 1


def fill(table: Table, job: Calibration, *, brief: bool = False) -> None:
    """Add all rows: the paper's, the ablation of smoothing, and what the main job chooses.

    `brief` leaves out the search's own ablation and the rotation.
    """
    bos = table.calibration.checkpoint.bos_token_id
    table.weights_only("W8 only")
    table.fixed("W8A8", (), 0)
    for kept in (4, 10, 30):
        table.fixed(f"W8A8 + QFeM, {kept} linears", (), kept)
    if bos is not None:
        table.fixed("W8A8 + QFeP [BOS]", (bos,), 0)
        for kept in (4, 10):
            table.fixed(f"W8A8 + QFeP [BOS] + QFeM, {kept} linears", (bos,), kept)
        table.smoothed((bos,))
        if not brief:
            table.searched(job, (bos,))
    table.automatic("automatic", job)
    chosen = table.recipes["automatic"]
    prefix = chosen.prefix_ids if chosen else ()
    static = replace(job.options, activations="static")
    table.automatic("automatic, static, the same prefix", job.with_options(static), prefix)
    budget = job.with_options(replace(static, max_fp16_modules=BUDGET))
    table.automatic(f"automatic, static, --max-fp16-modules {BUDGET}, the same prefix", budget, prefix)
    per_token = replace(job.options, activations="per-token")
    table.automatic("automatic, per token, the same prefix", job.with_options(per_token), prefix)
    if brief:
        return
    try:
        table.automatic("automatic, --rotation always", job.with_options(replace(job.options, rotation="always")))
    except RecipeError as error:  # some families cannot be rotated
        print(f"automatic, --rotation always: {error}", flush=True)


def evaluate(table: Table) -> list[Row]:
    """Run every recipe on the evaluation windows, as a bundle in ONNX Runtime."""
    calibration = table.calibration
    config = calibration.checkpoint.config
    prefixes = {recipe.prefix_ids for recipe in table.recipes.values() if recipe is not None}
    behind = {prefix: unquantized_perplexity(calibration, prefix) for prefix in ((), *prefixes)}
    check = check_variants(
        calibration.checkpoint,
        lambda: calibration.model.decoder,
        table.corpus,
        calibration.windows.evaluation,
        [Variant(name, recipe) for name, recipe in table.recipes.items()],
        ExportOptions("float32"),
    )
    measured = {row.name: row for row in check.variants}
    rows = []
    for name, recipe in table.recipes.items():
        found = measured[name]
        assert found.top1_agreement is not None
        assert found.kl_divergence is not None
        prefix = recipe.prefix_ids if recipe else ()
        rows.append(
            Row(
                name=name,
                perplexity=found.perplexity,
                increase=found.perplexity / behind[()] - 1,
                top1_agreement=found.top1_agreement,
                kl_divergence=found.kl_divergence,
                kept_linears=len(
                    recipe.kept_linears() if recipe else [name for name in linears(config) if not is_router(name)]
                ),
                mac_share=quantized_mac_share(calibration.checkpoint, recipe) if recipe else 0.0,
                prefix=prefix,
                behind_prefix=behind[prefix] if prefix else None,
            )
        )
    return rows


def quantized_mac_share(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """Return the share of the linears' multiply-accumulates that run in 8 bits."""
    shares = mac_shares(checkpoint.config, representatives(checkpoint.config))
    return math.fsum(share for name, share in shares.items() if recipe.modules[name].number_format)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table."""
    for row in rows:
        behind = "" if row.behind_prefix is None else f"  FP32 behind {list(row.prefix)}: {row.behind_prefix:.3f}"
        print(
            f"{row.name:45s} {row.perplexity:8.3f} {100 * row.increase:+8.2f} %"
            f"  top-1 {100 * row.top1_agreement:6.2f} %  KL {row.kl_divergence:.4f}"
            f"  kept {row.kept_linears:3d}  8-bit MACs {100 * row.mac_share:5.1f} %{behind}"
        )


def limited(calibration: Calibration, windows: int | None) -> Calibration:
    """Return the calibration with the first so many evaluation windows only."""
    evaluation: NDArray[np.int64] = calibration.windows.evaluation[:windows]
    return replace(calibration, windows=replace(calibration.windows, evaluation=evaluation))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's path, or smollm2 (default) or gemma3")
    parser.add_argument("--windows", type=int, help="evaluate on the first so many windows only")
    parser.add_argument("--samples", type=int, default=JOB.samples, help="calibration windows of the automatic rows")
    parser.add_argument("--brief", action="store_true", help="without the ablation of the search, and the rotation")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args(arguments)
    name = given.model or "smollm2"
    checkpoint = open_checkpoint(str(model_path(MODELS[name])) if name in MODELS else name)
    calibration = limited(table_calibration(checkpoint), given.windows)
    table = Table(calibration, default_corpus())
    fill(table, job_calibration(calibration, given.samples), brief=given.brief)
    count, length = calibration.windows.evaluation.shape
    rows = evaluate(table)
    print(f"{checkpoint.name}: {count} windows of {length} tokens")
    print_rows(rows)
    if given.json:
        document = {"model": checkpoint.name, "windows": count, "rows": list(map(asdict, rows))}
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
