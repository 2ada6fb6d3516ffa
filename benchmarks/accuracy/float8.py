"""Perplexity in FP8 beside INT8, and what an FP8 scale has to cover; simulated on the accuracy table's windows.

`plain` quantizes every linear behind no prefix and without smoothing; `recipe` is a recipe that calibration wrote.
Run: python -m benchmarks.accuracy.float8 [--model MODEL] [--recipe FILE] [--windows N]
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.table import simulated_perplexity, table_calibration, unquantized_perplexity
from benchmarks.fetch_models import smollm2_path
from spike_export.artifacts.recipe import ModulePlan, Recipe, load_recipe
from spike_export.calibration.corpus.corpus import default_corpus
from spike_export.calibration.corpus.token_windows import TokenWindows
from spike_export.calibration.float8 import float8_modules
from spike_export.calibration.methods.context import Calibration
from spike_export.calibration.methods.module_choice import NOTHING_KEPT
from spike_export.calibration.recipe_writer import build_recipe
from spike_export.checkpoint.opening import open_checkpoint

HEADROOM = 8.0
"""By what factor a scale covers more than the maximum, to show what that costs."""


def main() -> None:
    """Print a line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="HF directory, .gguf file or hub id (default: SmolLM2-135M)")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    arguments = parser.parse_args()
    whole = table_calibration(open_checkpoint(arguments.model or str(smollm2_path())))
    windows = TokenWindows(whole.windows.calibration, whole.windows.evaluation[: arguments.windows])
    calibration = replace(whole, windows=windows, options=replace(whole.options, activation_range="sample-mean"))
    recipes = {"recipe": load_recipe(arguments.recipe)} if arguments.recipe else {}
    for name, recipe in (recipes | {"plain": plain_recipe(calibration)}).items():
        behind = unquantized_perplexity(calibration, recipe.prefix_ids)
        print(f"{name}, unquantized behind its prefix {behind:.3f}", flush=True)
        for label, modules in variants(recipe).items():
            perplexity = simulated_perplexity(calibration, recipe.model_copy(update={"modules": modules}))
            print(f"{name}, {label} {perplexity:.3f}", flush=True)


def plain_recipe(calibration: Calibration) -> Recipe:
    """Return static W8A8 of every linear."""
    statistics = calibration.measure(())
    return build_recipe(calibration, default_corpus(), statistics, NOTHING_KEPT)


def variants(recipe: Recipe) -> dict[str, Mapping[str, ModulePlan]]:
    """Return a recipe's plans in INT8 and in FP8, whose scales cover more or less."""
    covering = float8_modules(recipe)
    narrow = {name: plan.model_copy(update={"activation_amax": None}) for name, plan in recipe.modules.items()}
    per_token = {
        name: plan.model_copy(update={"activations": "per-token"}) if plan.number_format else plan
        for name, plan in covering.items()
    }
    return {
        "INT8": recipe.modules,
        "FP8, the maximum covered": covering,
        "FP8, what INT8 covers": float8_modules(recipe.model_copy(update={"modules": narrow})),
        f"FP8, {HEADROOM:g} times the maximum covered": scaled(covering, HEADROOM),
        "FP8, per token": per_token,
    }


def scaled(modules: Mapping[str, ModulePlan], factor: float) -> dict[str, ModulePlan]:
    """Return plans whose static scales are larger by a factor."""
    return {
        name: plan.model_copy(update={"activation_scale": plan.activation_scale * factor})
        if plan.activation_scale
        else plan
        for name, plan in modules.items()
    }


if __name__ == "__main__":
    main()
