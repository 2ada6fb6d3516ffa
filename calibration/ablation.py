"""Recipes that leave methods out, so that a check shows what each contributes."""

from dataclasses import replace

from spike_export.artifacts.recipe import Recipe
from spike_export.calibration.corpus.corpus import Corpus
from spike_export.calibration.corpus.mixture import Mixture
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.module_choice import NOTHING_KEPT
from spike_export.calibration.methods.qfem import ModuleChoice, Scores
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.calibration.statistics.spikes import SpikeStatistics


def ablations(
    calibration: Calibration, corpus: Corpus | Mixture, plain: SpikeStatistics, behind: SpikeStatistics, recipe: Recipe
) -> dict[str, Recipe]:
    """Return variant name → recipe: nothing but W8A8, with QFeM, with QFeP, and with both.

    Their scales cover the plain maximum and their head is not quantized, as in the paper. QFeM keeps as many linears
    as `recipe` does. A variant whose method `recipe` does not use is left out.

    Args:
        plain: Statistics without a prefix.
        behind: Statistics behind the recipe's prefix; `plain` again when it has none.
    """
    options = calibration.options
    paper = calibration.with_options(
        replace(options, activation_range="max", head="unquantized", activations=options.searched_activations)
    )
    config = calibration.checkpoint.config
    kept = len(recipe.kept_linears())

    def highest(statistics: SpikeStatistics) -> ModuleChoice:
        return Scores.sorted("ratio", statistics.ratios(), config).keep_highest(kept)

    recipes = {"w8a8": build_recipe(paper, corpus, plain, NOTHING_KEPT)}
    if kept:
        recipes["w8a8+qfem"] = build_recipe(paper, corpus, plain, highest(plain))
    if recipe.prefix:
        recipes["w8a8+qfep"] = build_recipe(paper, corpus, behind, NOTHING_KEPT)
    if kept and recipe.prefix:
        recipes["w8a8+qfem+qfep"] = build_recipe(paper, corpus, behind, highest(behind))
    return recipes
