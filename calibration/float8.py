"""FP8 E4M3 as the twin of INT8: what a recipe quantizes to integers becomes W8A8 in 8-bit floats."""

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import QMAX, ModulePlan, Recipe, activation_scale


def float8_modules(recipe: Recipe) -> dict[str, ModulePlan]:
    """Return the recipe's plans with FP8 where they say INT8; prefix, smoothing and kept modules stay as they are.

    An INT8 scale may leave out the rarest values to make its steps finer. The steps of a float grow with the value, so
    that a scale covering all of them costs the others next to nothing: an FP8 scale covers whatever calibration saw.

    Raises:
        RecipeError: The recipe quantizes attention's operands too, which is done in INT8 only.
    """
    if recipe.attention:
        raise RecipeError(
            "the recipe quantizes attention's operands to INT8, which does not go with FP8 linears; calibrate with "
            "--attention unquantized, or export as int8"
        )
    return {name: _float8(plan) for name, plan in recipe.modules.items()}


def _float8(plan: ModulePlan) -> ModulePlan:
    if plan.precision != "int8":
        return plan
    changes: dict[str, str | float | None] = {"precision": "fp8", "clip": None}
    if plan.activation_scale is not None:
        covered = plan.activation_scale * QMAX / min(plan.clip or 1.0, 1.0)
        changes["activation_scale"] = activation_scale(max(covered, plan.activation_amax or 0.0), "fp8")
    return plan.model_copy(update=changes)
