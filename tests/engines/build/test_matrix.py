"""Every family under every scheme, with either cache, becomes a TensorRT-RTX plan that computes as its recipe says.

By default one graph for each family has the four schemes, one a layer, and one of the two caches. `--slow` builds it
with the other cache too, and each scheme alone, and FP8, for all default targets.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spike_export.artifacts.manifest import CacheKind
from spike_export.artifacts.recipe import ModulePlan, Recipe
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.families import FAMILIES
from spike_export.checkpoint.modules import (
    expert_of,
    is_down_projection,
    is_router,
    linears,
    representative_of,
    representatives,
    split_name,
)
from spike_export.engines.audit.verdict import WEIGHT_ONLY
from spike_export.engines.build.builder import BuildEnvironment, BuildResult
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BatchRange, BuildOptions
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.engines.build.test_static_cache import program_buffers
from tests.support.built_plans import audit_plan, build_plan
from tests.support.tiny.families import tiny_family
from tests.support.tiny.models import tiny_recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)

CACHES: Mapping[CacheKind, CacheOptions] = {"dynamic": CacheOptions(), "static": CacheOptions("static", 48)}

SCHEMES: Mapping[str, ModulePlan] = {
    "per-tensor": ModulePlan(precision="int8", activation_scale=0.02),
    "float16": ModulePlan(precision="float16", ratio=900.5, reason="test"),
    "per-token": ModulePlan(precision="int8", activations="per-token"),
    "weights": ModulePlan(precision="float16", weights="int8"),
}
"""W8A8 with static scales (made unequal later on) and with scales per token, W8A16, and what is kept."""

FOUND: Mapping[str, tuple[str, str]] = {
    "per-tensor": ("int8", "int8"),
    "float16": ("float16", "float16"),
    "per-token": ("int8", "int8"),
    "weights": ("float16+int8-weights", WEIGHT_ONLY),
    "fp8": ("fp8", "fp8"),
}
"""Scheme → what is planned for a linear, and what the audit finds."""

MODELS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
"""Changes to a family's tiny model, if any."""

ROPES_BY_LENGTH: Mapping[str, Mapping[str, Any]] = {
    "granite": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "qwen3": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
            "factor": 4.0,
            "short_factor": [1.1] * 8,
            "long_factor": [2.0] * 8,
        }
    },
}
"""The same where the cache is dynamic: these ropes depend on the length, and a static cache is refused them."""

PREFIX = (1, 5, 7)

LAYERS = 3
"""TensorRT-RTX 1.7 builds with two what it cannot build with three and more."""


def family_checkpoint(family: str, layers: int, cache: CacheKind) -> Checkpoint:
    ropes = ROPES_BY_LENGTH if cache == "dynamic" else {}
    # TensorRT-RTX 1.7 fails at heads 12 wide, which no real model has.
    changes = {"head_dim": 16, **MODELS.get(family, {}), **ropes.get(family, {})}
    return tiny_family(family, num_hidden_layers=layers, **changes).checkpoint


def prefix_of(family: str, cache: CacheKind, scheme: str | None = None) -> tuple[int, ...]:
    """Every second cell of the matrix has a prefix, whichever way one goes."""
    place = list(FAMILIES).index(family) + list(CACHES).index(cache) + (list(FOUND).index(scheme) if scheme else 0)
    return PREFIX if place % 2 == 0 else ()


def layered_recipe(checkpoint: Checkpoint, schemes: Sequence[str], prefix: Sequence[int]) -> Recipe:
    """One scheme a layer; static scales differ from input to input, and siblings share theirs as they must."""
    config = checkpoint.config
    scales = {name: 0.02 + 0.001 * index for index, name in enumerate(representatives(config))}
    plans = {}
    for module in linears(config):
        plan = SCHEMES[schemes[split_name(module)[0]]]
        if is_router(module):
            plan = ModulePlan(precision="float32", reason="router")
        elif plan.activation_scale is not None:
            plan = plan.model_copy(update={"activation_scale": scales[representative_of(module)]})
        plans[module] = plan
    recipe = tiny_recipe(checkpoint, dict.fromkeys(plans, 1.0), prefix=prefix)
    return Recipe.model_validate({**recipe.model_dump(), "modules": plans})


def merged_products(recipe: Recipe) -> int:
    """INT8 products of one profile: what reads one quantized tensor is one.

    Siblings share their input's static scale. Per token, the experts of a layer all read the same quantized tokens.
    """
    inputs: set[object] = set()
    for module, plan in recipe.modules.items():
        if plan.precision == "int8":
            gathered = plan.per_token and expert_of(module) is not None
            in_common = gathered and not is_down_projection(module)
            inputs.add(split_name(module)[0] if in_common else representative_of(module))
    return len(inputs)


def expectation(recipe: Recipe, schemes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Module → what is planned and what is found."""
    routers = {module: ("float32", "float32") for module in recipe.modules if is_router(module)}
    linear = {module: FOUND[schemes[split_name(module)[0]]] for module in recipe.modules}
    return linear | routers | {"lm_head": ("float16", "float16")}


def build(bundle: Path, *targets: str) -> BuildResult:
    """Build both profiles; without targets for the backend's default ones."""
    options = BuildOptions(targets=targets, batch=BatchRange(1, 1, 2))
    return build_plan(bundle, bundle.with_suffix(".plan"), options, environment=CPU)


def assert_as_planned(result: BuildResult, recipe: Recipe, schemes: Sequence[str], cache: CacheKind) -> None:
    audit, expected = result.audit, expectation(recipe, schemes)
    assert audit.readable
    assert {module.module: (module.planned, *module.found) for module in audit.modules} == expected
    assert result.deviations == ()
    assert [profile.name for profile in result.sidecar.profiles] == ["prefill", "decode"]
    assert audit.profiles == 2
    assert result.sidecar.prefix == len(recipe.prefix_ids)
    # A static cache is read and written under one name, that of the output; a dynamic one is not.
    pasts, presents = (
        {f"{stem}.{layer}.{kind}" for layer in range(len(schemes)) for kind in ("key", "value")}
        for stem in ("past_key_values", "present")
    )
    read, written = (set[str]().union(*names) for names in zip(*program_buffers(result.plan), strict=True))
    assert (read, written) == (presents if cache == "static" else pasts, presents)


def cells() -> Iterator[Any]:
    """Yield every family with every cache; half of the cells, of both caches, with and without a prefix, are quick."""
    for place, family in enumerate(FAMILIES):
        for index, cache in enumerate(CACHES):
            slow = (place // 2 + index) % 2 == 1
            yield pytest.param(family, cache, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("family", "cache"), cells())
def test_a_layer_of_every_scheme_runs_as_planned(tmp_path: Path, family: str, cache: CacheKind) -> None:
    # Shifted by one, so that in families of two kinds of layer every scheme meets both.
    shift = list(CACHES).index(cache)
    schemes = [*list(SCHEMES)[shift:], *list(SCHEMES)[:shift]]
    checkpoint = family_checkpoint(family, len(schemes), cache)
    recipe = layered_recipe(checkpoint, schemes, prefix_of(family, cache))
    export_bundle(checkpoint, recipe, ExportOptions("float16", cache=CACHES[cache]), tmp_path / "b")
    result = build(tmp_path / "b", "SM86")

    assert_as_planned(result, recipe, schemes, cache)
    assert result.audit.int8_products == 2 * merged_products(recipe)
    # Had each module been planned in another way, the audit would object to every one.
    other = {"int8": "float16", "float16": "float16+int8-weights", "float32": "int8", "float16+int8-weights": "float16"}
    swapped = {module: other[planned] for module, (planned, _) in expectation(recipe, schemes).items()}
    assert {module.module for module in audit_plan(result.plan, swapped).deviations} == set(swapped)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", FOUND)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_one_scheme_runs_as_planned_on_every_target(
    tmp_path: Path, family: str, cache: CacheKind, scheme: str
) -> None:
    checkpoint = family_checkpoint(family, LAYERS, cache)
    float8 = scheme == "fp8"  # a static INT8 recipe, exported in the other format
    schemes = ["per-tensor" if float8 else scheme] * LAYERS
    recipe = layered_recipe(checkpoint, schemes, prefix_of(family, cache, scheme))
    options = ExportOptions("float16", number_format="fp8" if float8 else "int8", cache=CACHES[cache])
    export_bundle(checkpoint, recipe, options, tmp_path / "b")
    result = build(tmp_path / "b")

    assert result.sidecar.targets == (("SM89", "SM120") if float8 else TENSORRT_RTX.default_targets)
    assert set(result.audit.targets) == set(result.sidecar.targets)
    assert_as_planned(result, recipe, [scheme] * LAYERS, cache)
    products = result.audit.int8_products, result.audit.fp8_products
    if float8:
        # SM120 among the targets keeps siblings apart.
        assert products == (0, 2 * sum(plan.precision == "int8" for plan in recipe.modules.values()))
    else:
        assert products == (2 * merged_products(recipe), 0)
