"""One layer of the decode program: how many kernels it compiles to on every target, and what they compute."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spike_export.artifacts.manifest import CacheKind
from spike_export.artifacts.recipe import Recipe
from spike_export.checkpoint.checkpoint import Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config
from spike_export.checkpoint.families import FAMILIES
from spike_export.checkpoint.modules import linears
from spike_export.engines.audit.kernel_count import attention_kernels, layer_kernels, unfused_attention
from spike_export.engines.audit.program_products import read_program_text
from spike_export.engines.audit.reading import Kernel
from spike_export.engines.build.builder import BuildEnvironment, BuildResult
from spike_export.engines.plan.backend import TENSORRT_RTX, Machine
from spike_export.engines.plan.build_options import BatchRange, BuildOptions
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.cache_options import CacheOptions
from tests.engines.build.test_matrix import MODELS
from tests.support.built_plans import build_plan
from tests.support.tiny.families import tiny_family
from tests.support.tiny.models import MemoryTensors, tiny_recipe

CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)

MOST = 12
"""Kernels of one layer in decode."""

LAYERS = 3
MIDDLE = "model.layers.1"
CACHES: Mapping[CacheKind, CacheOptions] = {"dynamic": CacheOptions(), "static": CacheOptions("static", 64)}
EVERY_TARGET = tuple((target,) for target in TENSORRT_RTX.default_targets)


def checkpoint() -> Checkpoint:
    """Of the shape of real models: grouped heads 64 wide, none of the widths too small for a product's kernel."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return Checkpoint("tiny", decoder_config(config.to_dict(), "tiny"), MemoryTensors(tensors), None, {})


def recipe_of(source: Checkpoint) -> Recipe:
    return tiny_recipe(source, dict.fromkeys(linears(source.config), 0.02), prefix=(1, 5, 7))


def export(folder: Path, cache: CacheKind) -> Path:
    source = checkpoint()
    export_bundle(source, recipe_of(source), ExportOptions("float16", cache=CACHES[cache]), folder)
    return folder


@pytest.fixture(scope="module", params=CACHES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CacheKind, Path]:
    return request.param, export(tmp_path_factory.mktemp("bundle") / "b", request.param)


def build(bundle: Path, targets: Sequence[str]) -> BuildResult:
    plan = bundle.with_name(f"{bundle.name}-{'-'.join(targets) or 'all'}.plan")
    return build_plan(bundle, plan, BuildOptions(targets=tuple(targets), profiles=("decode",)), environment=CPU)


def computed(kernels: Sequence[Kernel]) -> list[set[str]]:
    """Modules of one layer's kernels, in the order of their launch, without the layer's name."""
    return [{module.removeprefix(f"{MIDDLE}.") for module in kernel.computes} for kernel in kernels if kernel.computes]


def cells() -> Iterator[Any]:
    """Yield either cache for all targets at once and for each alone; `--slow` builds each alone with both caches."""
    for index, cache in enumerate(CACHES):
        yield pytest.param(cache, (), id=f"{cache}-all")
        for place, targets in enumerate(EVERY_TARGET):
            slow = (place + index) % 2 == 1
            yield pytest.param(cache, targets, id=f"{cache}-{targets[0]}", marks=[pytest.mark.slow] if slow else [])


@needs_rtx
@pytest.mark.parametrize(("bundle", "targets"), list(cells()), indirect=["bundle"], scope="module")
def test_a_decode_layer_is_at_most_twelve_kernels(bundle: tuple[CacheKind, Path], targets: tuple[str, ...]) -> None:
    cache, folder = bundle
    result = build(folder, targets)
    assert result.deviations == ()
    programs = read_program_text(result.plan).programs
    assert {target for program in programs for target in program.targets} == set(targets or result.sidecar.targets)
    assert len(result.audit.programs) == len(programs)
    for program, audit in zip(programs, result.audit.programs, strict=True):
        layers = layer_kernels(program.kernels)
        # The first layer's kernels make the masks too; every kernel is counted somewhere.
        assert audit.layer_kernels == tuple(len(layers[layer]) for layer in range(LAYERS))
        assert sum(audit.layer_kernels) + len(layers[None]) == audit.kernels == len(program.kernels)
        assert max(audit.layer_kernels) <= MOST
        # In place: both caches are written by the kernel that rotates.
        assert audit.layer_kernels[1] == {"static": 10, "dynamic": 12}[cache]
        # The fused groups, by name.
        assert computed(layers[1]) == [
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
            {"self_attn.o_proj"},
            {"mlp.gate_proj", "mlp.up_proj"},
            {"mlp.down_proj"},
        ]
        assert {frozenset(group) for group in audit.fused if group[0].startswith(f"{MIDDLE}.")} == {
            frozenset(f"{MIDDLE}.self_attn.{name}_proj" for name in "qkv"),
            frozenset(f"{MIDDLE}.mlp.{name}_proj" for name in ("gate", "up")),
        }
        assert audit.attention == {"_gemv_mha_v1": LAYERS}
        assert audit.unfused_attention == ()


KERNELS: Mapping[str, tuple[int, int]] = {
    "llama": (10, 12),
    "mistral": (10, 12),
    "gemma": (10, 12),
    "granite": (10, 12),
    "qwen2": (10, 12),
    "phi3": (10, 10),
    # Norms of queries and keys: each one's mean is a kernel of its own.
    "qwen3": (12, 14),
    "olmo2": (12, 14),
    "gemma3_text": (12, 14),
    # Its scores are capped, which no fused attention kernel does.
    "gemma2": (17, 17),
}
"""Family without experts → most kernels of a layer behind the first, with a static and with a dynamic cache."""


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.experts is None])
def test_a_decode_layer_of_every_family(tmp_path: Path, family: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    source = tiny_family(family, num_hidden_layers=LAYERS, **sizes, **MODELS.get(family, {})).checkpoint
    caches: tuple[CacheKind, ...] = ("static", "dynamic")
    for cache, expected in zip(caches, KERNELS[family], strict=True):
        options = ExportOptions("float16", cache=CACHES[cache])
        export_bundle(source, recipe_of(source), options, tmp_path / cache)
        result = build(tmp_path / cache, ())
        assert result.deviations == ()
        assert [max(program.layer_kernels[1:]) for program in result.audit.programs] == [expected]


VARIANTS: Mapping[str, tuple[Mapping[str, Any], ExportOptions, BuildOptions]] = {
    "per-token": ({"activations": "per-token"}, ExportOptions("float16"), BuildOptions(profiles=("decode",))),
    "bfloat16": ({}, ExportOptions("bfloat16"), BuildOptions(profiles=("decode",))),
    "last": ({}, ExportOptions("float16", logits="last"), BuildOptions(profiles=("decode",))),
    "batch": ({}, ExportOptions("float16"), BuildOptions(profiles=("decode",), batch=BatchRange(1, 4, 8))),
    "level-0": ({}, ExportOptions("float16"), BuildOptions(profiles=("decode",), optimization_level=0)),
    "level-5": ({}, ExportOptions("float16"), BuildOptions(profiles=("decode",), optimization_level=5)),
}
"""Changes to every module's plan, and how it is exported and built."""


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_count_is_the_same_in_every_variant(tmp_path: Path, variant: str) -> None:
    change, options, building = VARIANTS[variant]
    source = checkpoint()
    recipe = recipe_of(source)
    modules = {name: plan.model_copy(update=change) for name, plan in recipe.modules.items()}
    recipe = Recipe.model_construct(**{**dict(recipe), "modules": modules})
    for cache, count in (("static", 10), ("dynamic", 12)):
        folder = tmp_path / cache
        export_bundle(source, recipe, replace(options, cache=CACHES[cache]), folder)
        result = build_plan(folder, folder.with_suffix(".plan"), building, environment=CPU)
        assert result.deviations == ()
        assert [program.layer_kernels[1] for program in result.audit.programs] == [count]


@needs_rtx
def test_siblings_of_unequal_scales_are_told_apart(tmp_path: Path) -> None:
    """The control of the test above: what breaks a fused group is seen in the groups and in the count."""
    source = checkpoint()
    recipe = recipe_of(source)
    name = f"{MIDDLE}.mlp.up_proj"
    unequal = recipe.modules[name].model_copy(update={"activation_scale": 0.021})
    recipe = Recipe.model_construct(**{**dict(recipe), "modules": {**recipe.modules, name: unequal}})
    export_bundle(source, recipe, ExportOptions("float16", cache=CACHES["static"]), tmp_path / "b")
    result = build(tmp_path / "b", ("SM86",))
    (program,) = result.audit.programs
    assert program.layer_kernels[1] > program.layer_kernels[2]
    assert not any(name in group for group in program.fused)
    assert f"{MIDDLE}.self_attn.q_proj" in {module for group in program.fused for module in group}


@needs_rtx
def test_attention_without_a_fused_kernel_is_named(tmp_path: Path) -> None:
    source = checkpoint()
    export_bundle(source, recipe_of(source), ExportOptions("float32"), tmp_path / "b")
    options = BuildOptions(targets=("SM86",), profiles=("prefill",))
    (program,) = build_plan(tmp_path / "b", tmp_path / "e.plan", options, environment=CPU).audit.programs
    assert program.attention == {}
    assert program.unfused_attention == tuple(f"model.layers.{layer}.self_attn.Attention" for layer in range(LAYERS))


@needs_rtx
def test_the_bytes_of_int8_weights_are_those_of_the_model(bundle: tuple[CacheKind, Path]) -> None:
    """Every weight once for each profile, and nothing else is INT8 in a plan."""
    cache, folder = bundle
    options = BuildOptions(targets=("SM86",), profiles=("prefill", "decode"))
    result = build_plan(folder, folder.with_name(f"{cache}.plan"), options, environment=CPU)
    source = checkpoint()
    size = sum(
        source.stored_shape(f"{name}.weight")[0] * source.stored_shape(f"{name}.weight")[1]
        for name in linears(source.config)
    )
    assert [program.weight_bytes["int8"] for program in result.audit.programs] == [size, size]
    head_and_embedding = 2 * 2 * 128 * 256
    assert all(program.weight_bytes["float16"] >= head_and_embedding for program in result.audit.programs)


def kernel(name: str, *nodes: str) -> Kernel:
    return Kernel(name, nodes)


def test_a_kernel_counts_once_for_the_first_of_its_layers() -> None:
    kernels = [
        kernel("embed", "model.embed_tokens.Gather", "model.layers.0.input_layernorm.RMSNormalization"),
        kernel("join", "model.layers.1.input_layernorm.RMSNormalization", "model.layers.0.mlp_residual"),
        kernel("copy"),
        kernel("norm", "model.layers.10.mlp.product"),
        kernel("head", "lm_head.MatMul"),
    ]
    layers = layer_kernels(kernels)
    assert {layer: [each.name for each in those] for layer, those in layers.items()} == {
        0: ["embed", "join", "copy"],  # one that names nothing belongs where it stands
        10: ["norm"],
        None: ["head"],
    }


def test_attention_kernels_are_told_by_name_and_node() -> None:
    node = "model.layers.0.self_attn.Attention"
    fused = kernel("_gemm_mha_v2_myl0_4", node)
    other = replace(fused, name="__myl_ReshRepl", nodes=(node,))
    assert attention_kernels([fused, other]) == {"_gemm_mha_v2": 1}
    assert unfused_attention([fused, other]) == ()
    assert unfused_attention([other]) == (node,)
    assert attention_kernels([kernel("_gemm_mha_v2", "something.MatMul")]) == {}
