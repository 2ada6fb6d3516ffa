"""What compressed-tensors and vLLM cannot express: a recipe that needs it is refused."""

from collections.abc import Callable

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import Dtype, ModulePlan, Recipe
from spike_export.checkpoint.modules import expert_of, is_router, representative_of, split_name

_Obstacle = Callable[[Recipe, Dtype], str | None]


def require_expressible(recipe: Recipe, dtype: Dtype) -> None:
    """Refuse a recipe that vLLM would not compute as it says.

    Args:
        recipe: The plan.
        dtype: Precision of what is not quantized.

    Raises:
        RecipeError: Names what cannot be expressed, and the remedy.
    """
    for obstacle in _OBSTACLES:
        found = obstacle(recipe, dtype)
        if found is not None:
            raise RecipeError(f"--format compressed-tensors: {found}")


def _head(recipe: Recipe, _: Dtype) -> str | None:
    if recipe.scheme.head == "unquantized":
        return None
    return f"vLLM has no head in {recipe.scheme.head}; set scheme.head to unquantized, or calibrate without --head"


def _attention(recipe: Recipe, _: Dtype) -> str | None:
    name = next(iter(recipe.attention), None)
    if name is None:
        return None
    return f"vLLM does not quantize the operands of {name}; remove the recipe's attention, or calibrate without it"


def _hadamard(recipe: Recipe, _: Dtype) -> str | None:
    place = "down_proj" if recipe.hadamard is not None else next(iter(recipe.input_hadamard), None)
    if place is None:
        return None
    return f"the Hadamard transform in front of {place} is not written; calibrate with --hadamard never"


def _cache(recipe: Recipe, _: Dtype) -> str | None:
    if not recipe.kv_cache:
        return None
    return "steps of a cache in INT8 are not written; remove the recipe's kv_cache, or calibrate without it"


def _fp8(recipe: Recipe, _: Dtype) -> str | None:
    name = _first(recipe, lambda plan: plan.number_format == "fp8")
    return None if name is None else f"{name} is fp8 and this format is written in INT8; set its precision to int8"


def _weights_alone(recipe: Recipe, _: Dtype) -> str | None:
    name = _first(recipe, lambda plan: plan.number_format is None and plan.weights == "int8")
    if name is None:
        return None
    return f"{name} has INT8 weights alone (W8A16); calibrate with --excluded-weights unquantized"


def _float32(recipe: Recipe, dtype: Dtype) -> str | None:
    if dtype != "float16":
        return None
    for name, plan in recipe.modules.items():
        if plan.precision == "float32" and not is_router(name):
            return f"{name} is float32 and vLLM computes all kept modules in one precision; give --dtype bfloat16"
    return None


def _siblings(recipe: Recipe, _: Dtype) -> str | None:
    """Find linears that vLLM fuses (q, k and v; gate and up) and that are not quantized alike."""
    for name, plan in recipe.modules.items():
        first = representative_of(name)
        if _kind(plan) != _kind(recipe.modules[first]):
            return f"{name} and {first} read one input and vLLM fuses them; give both the same precision and scale"
    return None


def _kind(plan: ModulePlan) -> tuple[bool, bool, float | None]:
    return plan.number_format is not None, plan.per_token, plan.static_scale


def _experts(recipe: Recipe, _: Dtype) -> str | None:
    """Find a layer whose experts are not all kept, or all in the one INT8 scheme that vLLM has for experts."""
    first: dict[int, tuple[str, ModulePlan]] = {}
    for name, plan in recipe.modules.items():
        if expert_of(name) is None:
            continue
        other, its = first.setdefault(split_name(name)[0], (name, plan))
        if (plan.number_format is None) != (its.number_format is None):
            return f"vLLM needs one precision for all experts of a layer; {name} is {plan.precision}, {other} is not"
        if plan.number_format and not (plan.per_token and recipe.scheme.weights == "int8-per-channel"):
            return (
                f"vLLM has experts in INT8 with a scale per token and per channel of the weight only, unlike {name}; "
                "calibrate with --activations per-token --weights int8-per-channel"
            )
    return None


def _first(recipe: Recipe, matches: Callable[[ModulePlan], bool]) -> str | None:
    return next((name for name, plan in recipe.modules.items() if matches(plan)), None)


_OBSTACLES: tuple[_Obstacle, ...] = (
    _head,
    _attention,
    _hadamard,
    _cache,
    _fp8,
    _weights_alone,
    _float32,
    _siblings,
    _experts,
)
