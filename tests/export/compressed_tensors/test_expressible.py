"""What vLLM would not compute as the recipe says is refused, with the remedy."""

from typing import Any

import pytest

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import AttentionPlan, Dtype, HadamardPlan, KvCachePlan, ModulePlan, Recipe, Scheme
from spike_export.checkpoint.modules import linears
from spike_export.export.compressed_tensors.expressible import require_expressible
from tests.support.tiny.families import tiny_family
from tests.support.tiny.models import tiny_llama, tiny_recipe

Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"


def plain(family: str = "llama") -> Recipe:
    checkpoint = tiny_llama().checkpoint if family == "llama" else tiny_family(family).checkpoint
    names = linears(checkpoint.config)
    routers = {name: "float32" for name in names if name.endswith("mlp.gate")}
    return tiny_recipe(checkpoint, dict.fromkeys(names, 0.5), kept=routers)  # type: ignore[arg-type]


def changed(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    plan = ModulePlan.model_validate({**recipe.modules[name].model_dump(), **changes})
    return recipe.model_copy(update={"modules": {**recipe.modules, name: plan}})


KEPT = {"precision": "float16", "activations": None, "activation_scale": None}

CASES: dict[str, tuple[dict[str, Any] | None, str, Dtype, str]] = {
    "head": ({"scheme": Scheme(head="int8-weights")}, "", "float16", "head in int8-weights; set scheme.head"),
    "attention": (
        {"attention": {"model.layers.0.self_attn": AttentionPlan(query=1, key=1, value=1)}},
        "",
        "float16",
        "operands of model.layers.0.self_attn; remove",
    ),
    "input hadamard": (
        {"input_hadamard": {"model.layers.0.mlp.up_proj": 16}},
        "",
        "float16",
        "Hadamard transform in front of model.layers.0.mlp.up_proj .* --hadamard never",
    ),
    "hadamard": ({"hadamard": HadamardPlan(block=16)}, "", "float16", "Hadamard transform .* --hadamard never"),
    "cache": (
        {"kv_cache": {"model.layers.0.self_attn": KvCachePlan(key="AA==", value="AA==")}},
        "",
        "float16",
        "cache in INT8 are not written; remove the recipe's kv_cache",
    ),
    "fp8": ({"precision": "fp8"}, DOWN, "float16", f"{DOWN} is fp8 .* set its precision to int8"),
    "weights alone": ({**KEPT, "weights": "int8"}, DOWN, "float16", f"{DOWN} .*W8A16.* --excluded-weights unquantized"),
    "float32 module": ({**KEPT, "precision": "float32"}, DOWN, "float16", f"{DOWN} is float32 .* --dtype bfloat16"),
    "another scale": ({"activation_scale": 0.25}, K, "float16", f"{K} and {Q} read one input"),
    "another kind": ({"activations": "per-token"}, K, "float16", f"{K} and {Q} read one input"),
    "one kept": (KEPT, K, "float16", f"{K} and {Q} read one input"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_beyond_the_format_is_refused(case: str) -> None:
    changes, module, dtype, message = CASES[case]
    assert changes is not None
    recipe = changed(plain(), module, **changes) if module else plain().model_copy(update=changes)
    with pytest.raises(RecipeError, match="--format compressed-tensors: .*" + message):
        require_expressible(recipe, dtype)


def test_a_float32_module_fits_into_bfloat16() -> None:
    require_expressible(changed(plain(), DOWN, **{**KEPT, "precision": "float32"}), "bfloat16")


def test_experts_need_scales_per_token() -> None:
    recipe = plain("qwen3_moe")
    with pytest.raises(RecipeError, match=r"unlike model.layers.0.mlp.experts.0.up_proj; .* --activations per-token"):
        require_expressible(recipe, "float16")
    modules = {
        name: plan.model_copy(update={"activations": "per-token"}) if ".experts." in name else plan
        for name, plan in recipe.modules.items()
    }
    recipe = recipe.model_copy(update={"modules": modules})
    require_expressible(recipe, "float16")
    name = "model.layers.2.mlp.experts.5.down_proj"
    with pytest.raises(RecipeError, match=f"one precision for all experts of a layer; {name} is float16"):
        require_expressible(changed(recipe, name, **KEPT), "float16")
