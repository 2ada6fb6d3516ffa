"""Recipes that leave methods out, so that a check shows what each contributes."""

from dataclasses import replace

from spike_export.calibration import qfem
from spike_export.calibration.calibrate import Calibration, build_recipe
from spike_export.calibration.corpus import Corpus
from spike_export.calibration.qfem import ModuleChoice
from spike_export.calibration.recipe import Recipe
from spike_export.calibration.spikes import SpikeStatistics

_NOTHING_KEPT = ModuleChoice(alpha=float("inf"), kept=())


def ablations(
    calibration: Calibration, corpus: Corpus, plain: SpikeStatistics, behind: SpikeStatistics, recipe: Recipe
) -> dict[str, Recipe]:
    """Return variant name → recipe: nothing but W8A8, with QFeM, with QFeP, and with both.

    Their scales cover the plain maximum, as in the paper. QFeM keeps as many linears as `recipe` does. A variant
    whose method `recipe` does not use is left out.

    Args:
        plain: Statistics without a prefix.
        behind: Statistics behind the recipe's prefix; `plain` again when it has none.
    """
    paper = calibration.with_options(replace(calibration.options, activation_range="max"))
    kept = len(recipe.kept())
    recipes = {"w8a8": build_recipe(paper, corpus, plain, _NOTHING_KEPT)}
    if kept:
        recipes["w8a8+qfem"] = build_recipe(paper, corpus, plain, qfem.keep_highest(plain.ratios(), kept))
    if recipe.prefix:
        recipes["w8a8+qfep"] = build_recipe(paper, corpus, behind, _NOTHING_KEPT)
    if kept and recipe.prefix:
        recipes["w8a8+qfem+qfep"] = build_recipe(paper, corpus, behind, qfem.keep_highest(behind.ratios(), kept))
    return recipes
