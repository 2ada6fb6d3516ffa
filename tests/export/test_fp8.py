"""FP8 E4M3: rounding against the format's definition, graph against simulation, and what the compiler makes of it."""

import copy
import importlib.util
import json
import struct
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from spike_export.artifacts.errors import EngineError, RecipeError
from spike_export.artifacts.manifest import load_manifest
from spike_export.artifacts.recipe import (
    AttentionPlan,
    Dtype,
    ModulePlan,
    Recipe,
    Scheme,
    load_recipe,
    recipe_sha256,
    save_recipe,
)
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation, fake_quantize, fake_quantize_tokens
from spike_export.calibration.decoder.weight_quantization import quantize_weight
from spike_export.calibration.float8 import float8_modules
from spike_export.engines.audit.verdict import FLOAT8_WEIGHT_ONLY, NOT_FOUND, WEIGHT_ONLY, ModuleAudit
from spike_export.engines.build.builder import BuildEnvironment
from spike_export.engines.onnx_runtime.session import open_bundle
from spike_export.engines.plan import backend as plan_backend
from spike_export.engines.plan.backend import TENSORRT, TENSORRT_RTX, Gpu, Machine, omission, resolve_targets
from spike_export.engines.plan.build_options import BatchRange, BuildOptions, ProfileName
from spike_export.engines.plan.graph import load_graph, planned_precisions
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.graph.graph_builder import GraphBuilder
from spike_export.export.graph.linear import quantize_dequantize
from tests.support.built_plans import audit_plan, build_plan
from tests.support.cached_forward import cached_forward
from tests.support.graph_parity import token_errors
from tests.support.tiny.cli_models import call, write_model
from tests.support.tiny.models import CachedSession, TinyModel, input_scales, tiny_llama, tiny_recipe

PREFIX = (5, 1, 9)
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


def e4m3(values: NDArray[Any]) -> NDArray[np.float64]:
    """Round to the nearest of the format's values by its definition: 3 bits behind a leading one, exponents from -6."""
    magnitude = np.minimum(np.abs(np.asarray(values, np.float64)), 448)
    exponent = np.maximum(np.floor(np.log2(np.maximum(magnitude, 2.0**-20))), -6)
    step = np.exp2(exponent - 3)
    return np.sign(values) * np.rint(magnitude / step) * step  # rint: half to even


def probes() -> NDArray[np.float32]:
    """All positive values of the format, what lies halfway between neighbours, a little beside that, and beyond."""
    codes = [(1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) if code >= 8 else code / 8 * 2.0**-6 for code in range(127)]
    halves = [(low + high) / 2 for low, high in pairwise(codes)]
    beside = [half * factor for half in halves for factor in (1 - 2**-20, 1 + 2**-20)]
    positive = np.array([*codes, *halves, *beside, 449, 464, 480, 1e6, np.inf, 2**-11, 1e-30], np.float32)
    return np.concatenate([positive, -positive])


def roundtrip(scale: float) -> ort.InferenceSession:
    builder = GraphBuilder()
    x = builder.input("x", ir.DataType.FLOAT, ["n"])
    builder.output(quantize_dequantize(builder, "m", x, scale, number_format="fp8"), ["n"])
    return ort.InferenceSession(ir.to_proto(builder.model("q", "test", "0")).SerializeToString())


def test_rounding_is_the_formats_and_onnx_runtimes() -> None:
    values = probes()
    expected = e4m3(values)
    assert set(np.abs(expected)) == set(np.abs(values[:127].astype(np.float64)))  # every value is reached
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(values), 1.0, "fp8").numpy(), expected)
    np.testing.assert_array_equal(roundtrip(1.0).run(None, {"x": values})[0], expected)


def test_the_simulated_input_is_the_graphs_bit_for_bit() -> None:
    values = np.random.default_rng(0).standard_cauchy(20_000).astype(np.float32)
    scale = float(np.float32(0.0173))
    assert np.abs(values / scale).max() > 448  # some saturate
    simulated = fake_quantize(torch.from_numpy(values), scale, "fp8").numpy()
    np.testing.assert_array_equal(roundtrip(scale).run(None, {"x": values})[0], simulated)


def test_tokens_are_scaled_by_their_own_maximum() -> None:
    values = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32) * 10.0 ** np.arange(-2, 3)[:, None]
    values = np.concatenate([values, np.zeros((1, 40))]).astype(np.float32)
    step = np.maximum(np.abs(values).max(1, keepdims=True), np.float32(1e-5)) / np.float32(448)
    found = fake_quantize_tokens(torch.from_numpy(values), "fp8").numpy()
    np.testing.assert_allclose(found, e4m3(values / step) * step, rtol=2e-7, atol=0)


@pytest.mark.parametrize("scheme", ["int8-per-channel", "int8-per-tensor"])
def test_weights_by_definition(scheme: Any) -> None:
    weight = np.random.default_rng(2).normal(size=(24, 40)).astype(np.float32)
    weight[3] = 0
    quantized, scale = quantize_weight(weight, scheme, "fp8")
    amax = np.abs(weight).max(1, keepdims=True) if scheme == "int8-per-channel" else np.abs(weight).max()
    step = (np.maximum(amax, np.float32(1e-12)) / np.float32(448)).astype(np.float32)
    assert quantized.shape == (40, 24)
    assert quantized.dtype.itemsize == 1
    np.testing.assert_array_equal(scale.reshape(step.shape), step)
    np.testing.assert_array_equal(quantized.T.astype(np.float64), e4m3(weight / step))
    # A value of the upper binades is off by a sixteenth at most; INT8's steps are of one size.
    restored = quantized.T.astype(np.float32) * step
    large = np.abs(weight) > step * 2.0**-6
    assert (np.abs(restored - weight)[large] <= np.abs(weight)[large] / 16 * 1.0001).all()


def tokens(batch: int = 2, length: int = 12) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, 99, (batch, length))


def int8_recipe(
    model: TinyModel,
    kept: Mapping[str, Dtype] | None = None,
    prefix: tuple[int, ...] = (),
    scheme: Scheme | None = None,
    per_token: bool = False,
) -> Recipe:
    recipe = tiny_recipe(
        model.checkpoint, input_scales(model, tokens()), kept=kept, prefix=prefix, scheme=scheme or Scheme()
    )
    if not per_token:
        return recipe
    modules = {
        name: plan.model_copy(update={"activation_scale": None}) if plan.number_format else plan
        for name, plan in recipe.modules.items()
    }
    return recipe.model_copy(update={"modules": modules})


CASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "prefix": {"prefix": PREFIX},
    "kept": {"kept": {DOWN: "float32"}},
    "per-tensor": {"scheme": Scheme(weights="int8-per-tensor")},
    "per-token": {"per_token": True},
}


def defined_logits(model: TinyModel, recipe: Recipe) -> NDArray[Any]:
    """transformers' model with weights and inputs rounded by the format's definition; the prefix runs unquantized."""
    simulated = copy.deepcopy(model.reference)
    for name, plan in recipe.modules.items():
        if plan.precision != "int8":
            continue
        linear = simulated.get_submodule(name)
        weight = linear.weight.data.numpy()
        amax = np.abs(weight).max(1, keepdims=True) if "channel" in recipe.scheme.weights else np.abs(weight).max()
        step = (amax / np.float32(448)).astype(np.float32)
        linear.weight.data = torch.from_numpy((e4m3(weight / step) * step).astype(np.float32))
        covered = None if plan.activation_scale is None else plan.activation_scale * 127

        def quantize(_: Any, inputs: tuple[torch.Tensor], covered: float | None = covered) -> tuple[torch.Tensor]:
            x = inputs[0].numpy()
            amax = np.abs(x).max(-1, keepdims=True) if covered is None else np.float32(covered)
            step = (amax / np.float32(448)).astype(np.float32)
            return (torch.from_numpy((e4m3(x / step) * step).astype(np.float32)),)

        linear.register_forward_pre_hook(quantize)
    cache = DynamicCache()
    if recipe.prefix_ids:
        cached_forward(model.reference, torch.tensor([recipe.prefix_ids] * len(tokens())), cache)
    logits: NDArray[Any] = cached_forward(simulated, torch.from_numpy(tokens()), cache).numpy()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_graph_simulation_and_definition_agree(tmp_path: Path, case: str) -> None:
    model = tiny_llama(biases=True)
    recipe = int8_recipe(model, **CASES[case])
    export_bundle(model.checkpoint, recipe, ExportOptions("float32", number_format="fp8"), tmp_path / "bundle")
    simulation = Simulation(float8_modules(recipe), QuantizedWeights(recipe.scheme.weights))
    decoder = Decoder(model.checkpoint)
    states = decoder.run(tokens(), recipe.prefix_ids, visits=(simulation.visit,))
    simulated = decoder.head().logits(states.get(0)).numpy()
    graph = CachedSession(tmp_path / "bundle").run(tokens(), (5, 1, 6))
    defined = defined_logits(model, recipe)
    for actual, expected in ((graph, simulated), (graph, defined), (simulated, defined)):
        error = token_errors(actual, expected)
        # Float32 summation alone: 80 terms of 6e-8 through two layers, 5e-6. Where two orders straddle a rounding
        # boundary a value moves by one step, at most 1/14 of its range, and the token and later ones with it.
        assert np.median(error) < 2e-5
        assert error.max() < 0.05
    plain = model.reference(torch.from_numpy(tokens())).logits.numpy()
    assert recipe.prefix_ids or np.median(token_errors(graph, plain)) > 1e-3  # and it is not the unquantized model


def test_the_float16_bundle_runs_in_the_embedded_engine(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = int8_recipe(model, {DOWN: "float16"}, (1,))
    export_bundle(model.checkpoint, recipe, ExportOptions("float16", number_format="fp8"), tmp_path / "bundle")
    actual, expected = open_bundle(tmp_path / "bundle").prefill(tokens()), defined_logits(model, recipe)
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.1 * np.sqrt(np.mean(expected**2))


def test_a_scale_covers_what_calibration_saw() -> None:
    model = tiny_llama()
    recipe = int8_recipe(model)
    plans = {
        "int8 alone": ModulePlan(precision="int8", activation_scale=2.0),
        "clipped": ModulePlan(precision="int8", activation_scale=2.0, clip=0.5),
        "rare spike": ModulePlan(precision="int8", activation_scale=2.0, activation_amax=1000.0, clip=0.5),
        "margin": ModulePlan(precision="int8", activation_scale=2.0, clip=1.25),
        "mean above": ModulePlan(precision="int8", activation_scale=2.0, activation_amax=100.0),
        "per token": ModulePlan(precision="int8", activations="per-token"),
        "kept": ModulePlan(precision="float16", ratio=7.0, reason="score > alpha"),
        "weights": ModulePlan(precision="float16", weights="int8"),
    }
    found = float8_modules(recipe.model_copy(update={"modules": plans}))
    covered = {name: (plan.activation_scale or 0) * 448 for name, plan in found.items()}
    assert covered == pytest.approx(
        {"int8 alone": 254, "clipped": 508, "rare spike": 1000, "margin": 254, "mean above": 254}
        | {"per token": 0, "kept": 0, "weights": 0}
    )
    assert [plan.precision for plan in found.values()] == ["fp8"] * 6 + ["float16"] * 2
    assert found["kept"] == plans["kept"]
    assert found["weights"] == plans["weights"]
    for plan in found.values():
        scale = plan.activation_scale
        assert scale is None or struct.unpack("f", struct.pack("f", scale))[0] == scale  # a float32 value


def test_siblings_share_their_scale_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_llama()
    export_bundle(model.checkpoint, int8_recipe(model), ExportOptions("float32", number_format="fp8"), tmp_path / "b")
    graph = onnx.load(tmp_path / "b" / "model.onnx").graph
    raw = {tensor.name: tensor for tensor in graph.initializer}
    scales = [onnx.numpy_helper.to_array(raw[f"model.layers.0.self_attn.{x}_proj.input_scale"]) for x in "qkv"]
    assert len({scale.tobytes() for scale in scales}) == 1
    assert {raw[f"{UP}.{part}"].data_type for part in ("weight", "weight_zero_point", "input_zero_point")} == {
        onnx.TensorProto.FLOAT8E4M3FN
    }
    assert raw[f"{UP}.weight_scale"].data_type == onnx.TensorProto.FLOAT


def test_the_manifest_says_what_the_bundle_is(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = int8_recipe(model, {DOWN: "float16"})
    sizes = {}
    for name in ("int8", "fp8"):
        export_bundle(model.checkpoint, recipe, ExportOptions("float16", number_format=name), tmp_path / name)  # type: ignore[arg-type]
        sizes[name] = (tmp_path / name / "model.onnx.data").stat().st_size
    int8, fp8 = load_manifest(tmp_path / "int8"), load_manifest(tmp_path / "fp8")
    assert {kind: share.modules for kind, share in fp8.linears.items()} == {"fp8": 13, "float16": 1}
    assert fp8.linears["fp8"] == int8.linears["int8"]
    assert int8.engines == ("onnxruntime", "tensorrt", "tensorrt-rtx")
    assert fp8.engines == (
        "onnxruntime (FP8 rounded to and multiplied in float32)",
        "tensorrt (SM89 and later)",
        "tensorrt-rtx (SM89 and later)",
    )
    # One recipe, two formats: the hash is that of the file which the user has.
    assert int8.model.recipe_sha256 == fp8.model.recipe_sha256 == recipe_sha256(recipe)
    assert sizes["fp8"] == sizes["int8"]


def test_a_bfloat16_bundle_does_not_name_onnx_runtime(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = int8_recipe(model, {DOWN: "bfloat16"})
    manifest = export_bundle(model.checkpoint, recipe, ExportOptions("bfloat16"), tmp_path / "b")
    assert manifest.engines == ("tensorrt", "tensorrt-rtx")


def test_quantized_attention_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    attention = {"model.layers.0.self_attn": AttentionPlan(query=1.0, key=1.0, value=1.0)}
    recipe = int8_recipe(model).model_copy(update={"attention": attention})
    with pytest.raises(RecipeError, match=r"attention's operands to INT8.*--attention unquantized") as caught:
        export_bundle(model.checkpoint, recipe, ExportOptions("float16", number_format="fp8"), tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_a_recipe_may_hold_fp8_modules_beside_int8_ones(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = int8_recipe(model)
    mixed = {**recipe.modules, DOWN: float8_modules(recipe)[DOWN]}
    save_recipe(recipe.model_copy(update={"modules": mixed}), tmp_path / "recipe.json")
    read = load_recipe(tmp_path / "recipe.json")
    manifest = export_bundle(model.checkpoint, read, ExportOptions("float32"), tmp_path / "b")
    assert {kind: share.modules for kind, share in manifest.linears.items()} == {"fp8": 1, "int8": 13}
    assert np.isfinite(open_bundle(tmp_path / "b").prefill(tokens())).all()

    unscaled = {**mixed, DOWN: mixed[DOWN].model_copy(update={"activation_scale": None})}
    save_recipe(read.model_copy(update={"modules": unscaled}), tmp_path / "unscaled.json")
    with pytest.raises(RecipeError, match="precision fp8 with static activations needs an activation_scale"):
        load_recipe(tmp_path / "unscaled.json")
    attention = {"model.layers.0.self_attn": AttentionPlan(query=1.0, key=1.0, value=1.0)}
    save_recipe(read.model_copy(update={"attention": attention}), tmp_path / "both.json")
    with pytest.raises(RecipeError, match="precision fp8 does not go with operands of attention in INT8"):
        load_recipe(tmp_path / "both.json")


def test_the_command_line_exports_fp8_and_refuses_what_cannot_be_meant(tmp_path: Path) -> None:
    from spike_export.checkpoint.modules import linears
    from spike_export.checkpoint.opening import open_checkpoint

    folder = write_model(tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    recipe = tiny_recipe(checkpoint, dict.fromkeys(linears(checkpoint.config), 0.5))
    save_recipe(recipe, tmp_path / "recipe.json")
    given = ("--recipe", tmp_path / "recipe.json", "--number-format", "fp8", "--out")
    assert call("export", folder, *given, tmp_path / "b").code == 0
    assert set(load_manifest(tmp_path / "b").linears) == {"fp8"}

    line = call("export", folder, "--no-quantize", "--number-format", "fp8", "--out", tmp_path / "c").error
    assert "--number-format fp8 and --no-quantize contradict each other; give one" in line
    line = call("export", folder, *given, tmp_path / "c", "--number-format", "fp4").error
    assert "--number-format" in line
    main = (folder, "--out", tmp_path / "e.plan", "--number-format", "fp8")
    line = call(*main, "--attention", "int8-per-tensor-static").error
    assert "--attention int8-per-tensor-static does not go with --number-format fp8" in line
    line = call(*main, "--backend", "tensorrt-rtx", "--target", "SM86").error
    assert "SM86 does not multiply FP8" in line or "not installed" in line
    line = call("build", tmp_path / "b", "--out", tmp_path / "e.plan", "--target", "SM80").error
    assert "SM80 does not multiply FP8" in line or "no TensorRT backend" in line
    assert not (tmp_path / "e.plan").exists()


def test_hardware_compatibility_without_fp8_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(frozenset({"tensorrt"}), Gpu("H200", "SM90"), versions={"tensorrt": "11.4.0"})
    monkeypatch.setattr(plan_backend, "detect_machine", lambda: machine)
    options = ("--number-format", "fp8", "--hardware-compatible", "ampere-plus")
    line = call(tmp_path / "no model", "--out", tmp_path / "e.plan", *options).error
    assert "--hardware-compatible ampere-plus takes GPUs that do not multiply FP8" in line
    assert list(tmp_path.iterdir()) == []


def test_targets_without_fp8_are_left_out_or_refused() -> None:
    assert resolve_targets(TENSORRT_RTX, (), None, float8=True) == ("SM89", "SM120")
    assert resolve_targets(TENSORRT_RTX, (), None) == TENSORRT_RTX.default_targets
    assert omission(TENSORRT_RTX, ()) == "FP8 needs SM89 or later, so that SM80, SM86 are left out"
    assert omission(TENSORRT_RTX, ("SM89",)) is None
    assert resolve_targets(TENSORRT, (), Gpu("H200", "SM90"), float8=True) == ("SM90",)
    with pytest.raises(EngineError, match=r"SM80 does not multiply FP8.*from SM89 on"):
        resolve_targets(TENSORRT, (), Gpu("A100", "SM80"), float8=True)
    with pytest.raises(EngineError, match="SM86 does not multiply FP8"):
        resolve_targets(TENSORRT_RTX, ("sm89", "sm86"), None, float8=True)


@pytest.mark.parametrize(
    ("planned", "found", "verdict"),
    [
        ("fp8", ("fp8",), True),
        ("fp8", ("float32", "fp8"), False),
        ("fp8", ("int8",), False),
        ("fp8", (FLOAT8_WEIGHT_ONLY,), False),
        ("fp8", (NOT_FOUND,), False),
        ("int8", ("fp8",), False),
        ("float16", ("fp8",), False),
        ("float16", (FLOAT8_WEIGHT_ONLY,), False),
        ("float16+int8-weights", (FLOAT8_WEIGHT_ONLY,), False),
        ("float16+int8-weights", (WEIGHT_ONLY,), True),
    ],
)
def test_the_audits_verdict(planned: str, found: tuple[str, ...], verdict: bool) -> None:
    assert ModuleAudit("m", planned, found).as_planned is verdict


def test_the_plan_of_a_graph_is_read_from_its_quantizers(tmp_path: Path) -> None:
    model = tiny_llama()
    export_bundle(
        model.checkpoint, int8_recipe(model, {DOWN: "float16"}), ExportOptions("float16", number_format="fp8"), tmp_path
    )
    graph = load_graph(tmp_path / "model.onnx")
    noted = planned_precisions(graph)
    assert Counter(noted.values()) == {"fp8": 13, "float16": 2}
    for node in graph.graph.node:
        node.ClearField("metadata_props")
    assert planned_precisions(graph) == noted


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason=f"TensorRT-RTX is not installed: {TENSORRT_RTX.install}",
)
CPU = BuildEnvironment(Machine(frozenset({"tensorrt-rtx"}), gpu=None), available=None)


@needs_rtx
@pytest.mark.parametrize(
    ("dtype", "per_token", "profiles"),
    [("float16", False, ("prefill", "decode")), ("float16", True, ("prefill",)), ("float32", False, ("decode",))],
)
def test_every_fp8_linear_is_multiplied_in_fp8(
    tmp_path: Path, dtype: Dtype, per_token: bool, profiles: tuple[ProfileName, ...]
) -> None:
    model = tiny_llama()
    recipe = int8_recipe(model, {DOWN: dtype}, PREFIX, per_token=per_token)
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype, number_format="fp8"), tmp_path / "bundle")
    options = BuildOptions(profiles=profiles, batch=BatchRange(1, 1, 2))
    result = build_plan(tmp_path / "bundle", tmp_path / "engine.plan", options, environment=CPU)
    assert result.audit.readable
    assert result.deviations == ()
    assert Counter(module.planned for module in result.audit.modules) == {"fp8": 13, dtype: 2}
    assert result.audit.fp8_products == len(profiles) * 13
    assert result.audit.int8_products == 0
    assert result.sidecar.targets == ("SM89", "SM120")
    assert result.sidecar.backend.reason.endswith("FP8 needs SM89 or later, so that SM80, SM86 are left out")
    assert json.loads((tmp_path / "engine.json").read_text())["audit"]["fp8_products"] == len(profiles) * 13
    # Had anything else been planned, the audit would object.
    wrong = {UP: "int8", DOWN: "fp8", "model.layers.0.mlp.down_proj": dtype}
    assert {module.module for module in audit_plan(result.plan, wrong).deviations} == set(wrong)


def scale_the_wrong_axis(bundle: Path, module: str) -> None:
    """Give a weight a scale per input channel, which no product of 8 bits can take out of its sum."""
    model = onnx.load(bundle / "model.onnx")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.name == f"{module}.DequantizeLinear_weight")
    width = initializers[f"{module}.weight"].dims[1]
    node.attribute[0].i = 1
    scale = onnx.numpy_helper.from_array(np.linspace(0.1, 0.2, width, dtype=np.float32), f"{module}.weight_scale")
    initializers[f"{module}.weight_scale"].CopyFrom(scale)
    zero = onnx.helper.make_tensor(
        f"{module}.weight_zero_point", onnx.TensorProto.FLOAT8E4M3FN, [width], bytes(width), raw=True
    )
    initializers[zero.name].CopyFrom(zero)
    (bundle / "model.onnx.data").unlink()
    onnx.save_model(model, bundle / "model.onnx", save_as_external_data=True, location="model.onnx.data")


@needs_rtx
def test_negative_control_a_wrong_axis_is_found_out(tmp_path: Path) -> None:
    model = tiny_llama()
    export_bundle(
        model.checkpoint, int8_recipe(model), ExportOptions("float16", number_format="fp8"), tmp_path / "bundle"
    )
    scale_the_wrong_axis(tmp_path / "bundle", UP)
    options = BuildOptions(targets=("SM89",), profiles=("decode",))
    result = build_plan(tmp_path / "bundle", tmp_path / "engine.plan", options, environment=CPU)
    # For this target siblings are merged as in INT8: q+k+v, o, gate+up and down of two layers, one gate without its up.
    assert result.audit.fp8_products == 8
    (deviation,) = result.deviations
    assert (deviation.module, deviation.planned) == (UP, "fp8")
    assert "fp8" not in deviation.found
    assert NOT_FOUND not in deviation.found
