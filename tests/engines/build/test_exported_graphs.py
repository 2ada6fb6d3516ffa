"""What the exporter writes, the compiler takes: every variant of the graph, each linear in its planned precision.

By default every variant is built in one of the precisions, and every precision in some variant; `--slow` builds all.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spike_export.artifacts.manifest import LogitsScope
from spike_export.artifacts.recipe import (
    AttentionPlan,
    Dtype,
    HadamardPlan,
    HeadScheme,
    KvCacheDtype,
    ModulePlan,
    Recipe,
    Scheme,
    WeightScheme,
)
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.modules import linears
from spike_export.engines.audit.verdict import WEIGHT_ONLY
from spike_export.engines.build.builder import BuildEnvironment, BuildResult
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BatchRange, BuildOptions
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.built_plans import audit_plan, build_plan
from tests.support.tiny.kv_caches import with_kv_cache
from tests.support.tiny.models import LLAMA3_ROPE, MemoryTensors, input_scales, tiny_llama, tiny_recipe

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)
KEPT = "model.layers.1.mlp.down_proj"


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "dtype", "weights", "prefix"),
    [
        slow({}, "float16", "int8-per-channel", (1, 5, 7)),
        ({}, "float16", "int8-per-channel", ()),
        ({}, "bfloat16", "int8-per-channel", (1,)),
        ({}, "float32", "int8-per-channel", (1,)),
        ({"tie": True, "biases": True}, "float16", "int8-per-tensor", (1,)),
        ({"rope": LLAMA3_ROPE, "sliding_window": 16}, "float16", "int8-per-channel", (1, 5, 7)),
    ],
)
def test_an_exported_bundle_runs_as_planned(
    tmp_path: Path, case: dict[str, Any], dtype: Dtype, weights: WeightScheme, prefix: tuple[int, ...]
) -> None:
    model = tiny_llama(**case)
    scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 24)))
    scheme = Scheme(weights=weights, unquantized=dtype)
    recipe = tiny_recipe(model.checkpoint, scales, kept={KEPT: dtype}, prefix=prefix, scheme=scheme)
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype=dtype), tmp_path / "bundle")
    options = BuildOptions(targets=("SM86",), batch=BatchRange(1, 1, 2))
    result = build_plan(tmp_path / "bundle", tmp_path / "engine.plan", options, environment=CPU)
    assert result.audit.readable
    assert result.deviations == ()
    planned = {module.module: module.planned for module in result.audit.modules}
    assert planned == {name: plan.precision for name, plan in recipe.modules.items()} | {"lm_head": dtype}
    assert planned[KEPT] == dtype
    assert result.sidecar.prefix == len(prefix)


def build(folder: Path, dtype: Dtype, change: Callable[[Recipe], dict[str, Any]]) -> BuildResult:
    model = tiny_llama()
    scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 24)))
    recipe = tiny_recipe(model.checkpoint, scales)
    recipe = recipe.model_copy(update=change(recipe))
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype=dtype), folder / "bundle")
    return build_plan(folder / "bundle", folder / "engine.plan", BuildOptions(targets=("SM86",)), environment=CPU)


def per_token(recipe: Recipe) -> dict[str, Any]:
    return {"modules": dict.fromkeys(recipe.modules, ModulePlan(precision="int8", activations="per-token"))}


def static(_: Recipe) -> dict[str, Any]:
    return {}


def mixed(recipe: Recipe) -> dict[str, Any]:
    return {"modules": {**recipe.modules, KEPT: ModulePlan(precision="int8", activations="per-token")}}


def int8_attention(_: Recipe) -> dict[str, Any]:
    plan = AttentionPlan(query=0.05, key=0.04, value=0.03)
    return {"attention": {f"model.layers.{layer}.self_attn": plan for layer in range(2)}}


def test_an_int8_cache_is_restored_inside_of_attention(tmp_path: Path) -> None:
    """The plan reads and writes INT8, and has no kernel more than one with a cache in 16 bit."""
    model = tiny_llama()
    scales = input_scales(model, np.random.default_rng(0).integers(3, 99, (2, 24)))
    recipe = with_kv_cache(
        tiny_recipe(model.checkpoint, scales, prefix=(1, 5), scheme=Scheme(unquantized="float16")),
        model.checkpoint,
        np.full((1, 8), 3),
    )
    options, programs = BuildOptions(targets=("SM86",), profiles=("decode",)), []
    kinds: tuple[tuple[KvCacheDtype, bytes], ...] = (("int8", b"int8"), ("unquantized", b"half"))
    for dtype, element in kinds:
        bundle, plan = tmp_path / dtype, tmp_path / f"{dtype}.plan"
        export_bundle(model.checkpoint, recipe, ExportOptions("float16", kv_cache_dtype=dtype), bundle)
        result = build_plan(bundle, plan, options, environment=CPU)
        assert result.deviations == ()
        programs.append((result.audit.int8_products, result.audit.programs[0].layer_kernels))
        found = re.findall(rb'name="(?:past_key_values|present)\.1\.key[.\d]*"[^\n]* type=(\w+)', plan.read_bytes())
        assert set(found) == {element}
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (per_token, "float32"),
        (mixed, "float16"),
        (int8_attention, "float16"),
        slow(per_token, "float16"),
        slow(mixed, "float32"),
        slow(int8_attention, "float32"),
    ],
)
def test_per_token_scales_and_int8_attention_leave_every_linear_in_int8(
    tmp_path: Path, change: Callable[[Recipe], dict[str, Any]], dtype: Dtype
) -> None:
    result = build(tmp_path, dtype, change)
    assert result.deviations == ()
    found = {module.module: module.found for module in result.audit.modules}
    assert found.pop("lm_head") == (dtype,)
    assert set(found.values()) == {("int8",)}
    # q+k+v, o, gate+up, down of two layers in two profiles: the siblings are still merged.
    assert result.audit.int8_products == 2 * 2 * 4
    # A token's step is made in the kernel that rounds: the layer whose down_proj has such steps has no kernel more.
    first, second = result.audit.programs[1].layer_kernels
    assert first == second


@pytest.mark.parametrize("change", [static, slow(mixed)])
@pytest.mark.parametrize(("inputs", "kernels"), [((), 2), (("self_attn.q_proj", "mlp.up_proj"), 6)])
def test_a_hadamard_transform_costs_two_kernels(
    tmp_path: Path, change: Callable[[Recipe], dict[str, Any]], inputs: tuple[str, ...], kernels: int
) -> None:
    def transformed(recipe: Recipe) -> dict[str, Any]:
        spread = {f"model.layers.{layer}.{name}": 16 for layer in (0, 1) for name in inputs}
        return {"hadamard": HadamardPlan(block=16), "input_hadamard": spread, **change(recipe)}

    result = build(tmp_path, "float16", transformed)
    assert result.deviations == ()
    found = {module.module: module.found for module in result.audit.modules}
    del found["lm_head"]
    assert set(found.values()) == {("int8",)}
    assert result.audit.int8_products == 2 * 2 * 4
    without = build(tmp_path / "without", "float16", change)
    for program, plain in zip(result.audit.programs, without.audit.programs, strict=True):
        pairs = zip(program.layer_kernels or (), plain.layer_kernels or (), strict=True)
        assert [with_it - count for with_it, count in pairs] == [kernels, kernels]


@pytest.mark.parametrize("dtype", ["float16", slow("bfloat16"), "float32"])
def test_int8_weights_alone_are_told_from_int8_and_from_floating_point(tmp_path: Path, dtype: Dtype) -> None:
    def weights(recipe: Recipe) -> dict[str, Any]:
        layer = [name for name in recipe.modules if name.startswith("model.layers.1.")]
        return {"modules": {**recipe.modules, **dict.fromkeys(layer, ModulePlan(precision=dtype, weights="int8"))}}

    result = build(tmp_path, dtype, weights)
    assert result.deviations == ()
    found = {module.module: module.found for module in result.audit.modules}
    assert {module.planned for module in result.audit.modules} == {"int8", dtype, f"{dtype}+int8-weights"}
    assert found[KEPT] == (WEIGHT_ONLY,)
    assert found["model.layers.0.mlp.down_proj"] == ("int8",)
    # Had anything else been planned, the audit would object.
    wrong = {KEPT: dtype, "lm_head": f"{dtype}+int8-weights", "model.layers.0.mlp.down_proj": f"{dtype}+int8-weights"}
    assert {module.module for module in audit_plan(result.plan, wrong).deviations} == set(wrong)
    assert not audit_plan(result.plan, {KEPT: "int8"}).modules[0].as_planned


def wide_llama(vocabulary: int = 96) -> Checkpoint:
    """Wide enough for the compiler to dequantize a decode profile's weights in kernels of their own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    tensors = {name: tensor.detach().numpy() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    return Checkpoint("wide", decoder_config(config.to_dict(), "wide"), MemoryTensors(tensors), None, {})


@pytest.mark.parametrize("dtype", ["float16", slow("float32")])
def test_weights_dequantized_by_a_kernel_of_their_own_are_still_int8(tmp_path: Path, dtype: Dtype) -> None:
    checkpoint = wide_llama()
    kept = "model.layers.0.mlp.down_proj"
    plans = dict.fromkeys(linears(checkpoint.config), ModulePlan(precision=dtype, weights="int8"))
    plans[kept] = ModulePlan(precision=dtype)
    recipe = tiny_recipe(checkpoint, dict.fromkeys(plans, 1.0)).model_copy(update={"modules": plans})
    export_bundle(checkpoint, recipe, ExportOptions(dtype=dtype), tmp_path / "bundle")
    result = build_plan(tmp_path / "bundle", tmp_path / "engine.plan", BuildOptions(targets=("SM86",)), environment=CPU)
    assert result.deviations == ()
    found = {module.module: module.found for module in result.audit.modules}
    assert found.pop(kept) == found.pop("lm_head") == (dtype,)
    assert set(found.values()) == {(WEIGHT_ONLY,)}


HEADS: dict[HeadScheme, tuple[str, str]] = {
    "int8-weights": ("float32+int8-weights", WEIGHT_ONLY),
    "int8-per-token-dynamic": ("int8", "int8"),
}
"""Scheme → what is planned, and what the audit finds."""


@pytest.mark.parametrize(
    ("head", "dtype", "logits"),
    [
        ("int8-weights", "float16", "last"),
        ("int8-per-token-dynamic", "bfloat16", "last"),
        ("int8-per-token-dynamic", "float32", "all"),
        slow("int8-weights", "float32", "all"),
        slow("int8-per-token-dynamic", "float16", "all"),
    ],
)
def test_a_quantized_head_runs_as_planned(tmp_path: Path, head: HeadScheme, dtype: Dtype, logits: LogitsScope) -> None:
    checkpoint = wide_llama(vocabulary=1024)
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.02), scheme=Scheme(head=head))
    export_bundle(checkpoint, recipe, ExportOptions(dtype, logits=logits), tmp_path / "bundle")
    result = build_plan(tmp_path / "bundle", tmp_path / "engine.plan", BuildOptions(targets=("SM86",)), environment=CPU)
    assert result.deviations == ()
    found = {module.module: (module.planned, *module.found) for module in result.audit.modules}
    assert found["lm_head"] == HEADS[head]
    # Had the head been planned otherwise, the audit would object.
    assert not audit_plan(result.plan, {"lm_head": dtype}).modules[0].as_planned
