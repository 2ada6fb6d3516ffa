"""The quantized graph: its arithmetic against a simulation, and what ONNX Runtime makes of it."""

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from spike_export.artifacts.recipe import Dtype, Recipe, Scheme
from spike_export.export.bundle import ExportOptions, export_bundle
from tests.support.cached_forward import cached_forward
from tests.support.tiny.models import CachedSession, TinyModel, input_scales, tiny_llama, tiny_recipe

PREFIX = (5, 1, 9)
DOWN = "model.layers.1.mlp.down_proj"


def tokens(batch: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, 99, (batch, length))


def quantized_recipe(
    model: TinyModel,
    kept: Mapping[str, Dtype] | None = None,
    prefix: tuple[int, ...] = (),
    scheme: Scheme | None = None,
) -> Recipe:
    scales = input_scales(model, tokens(2, 12))
    return tiny_recipe(model.checkpoint, scales, kept=kept, prefix=prefix, scheme=scheme)


def fake_quantized(model: TinyModel, recipe: Recipe) -> Any:
    """transformers' model with quantized-and-restored weights and inputs, straight from the definition."""
    simulated = copy.deepcopy(model.reference)
    for name, plan in recipe.modules.items():
        if plan.precision != "int8":
            continue
        linear = simulated.get_submodule(name)
        weight = linear.weight.data
        amax = weight.abs().amax(1, keepdim=True) if "channel" in recipe.scheme.weights else weight.abs().max()
        linear.weight.data = torch.round(weight / (amax / 127)) * (amax / 127)
        step = torch.tensor(plan.activation_scale, dtype=torch.float32)

        def quantize(_: Any, inputs: tuple[torch.Tensor], step: torch.Tensor = step) -> tuple[torch.Tensor]:
            return (torch.clamp(torch.round(inputs[0] / step), -128, 127) * step,)

        linear.register_forward_pre_hook(quantize)
    return simulated


def simulated_logits(model: TinyModel, recipe: Recipe, ids: NDArray[np.int64]) -> NDArray[Any]:
    """The prefix runs unquantized; the rest follows it, quantized."""
    cache = DynamicCache()
    if recipe.prefix_ids:
        prefix = torch.tensor([recipe.prefix_ids] * len(ids))
        cached_forward(model.reference, prefix, cache)
    logits: NDArray[Any] = cached_forward(fake_quantized(model, recipe), torch.from_numpy(ids), cache).numpy()
    return logits


CASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "prefix": {"prefix": PREFIX},
    "kept": {"kept": {DOWN: "float32"}},
    "per-tensor": {"scheme": Scheme(weights="int8-per-tensor")},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
def test_float32_graph_equals_the_simulation(tmp_path: Path, case: str, biases: bool) -> None:
    model = tiny_llama(biases=biases)
    recipe = quantized_recipe(model, **CASES[case])
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "bundle")
    ids = tokens(2, 12)
    expected = simulated_logits(model, recipe, ids)
    actual = CachedSession(tmp_path / "bundle").run(ids, (5, 1, 6))
    error = np.abs(actual - expected).max(axis=-1) / np.abs(expected).max()
    # Without a rounding flip only float32 summation differs: K <= 80 terms, 6e-8 each, through two layers. Where two
    # summation orders straddle a rounding boundary, one value moves by one step (1/127 of its range): such a token,
    # and the later tokens that see it, may differ by that much, and no other.
    assert np.median(error) < 2e-5
    assert error.max() < 2e-2


@pytest.mark.usefixtures("denormals_as_before")
def test_one_linear_is_exact(tmp_path: Path) -> None:
    """On inputs that are multiples of the step the product is integer arithmetic and two scales, nothing else."""
    import onnx_ir as ir
    import onnxruntime as ort

    from spike_export.calibration.decoder.weight_quantization import quantize_weight
    from spike_export.checkpoint.decoder_config import tensor_shapes
    from spike_export.engines.onnx_runtime.session import session_options
    from spike_export.export.graph.graph_builder import GraphBuilder
    from spike_export.export.graph.linear import LinearEmitter

    model = tiny_llama()
    recipe = quantized_recipe(model)
    builder = GraphBuilder()
    emitter = LinearEmitter(
        builder, model.checkpoint, recipe.modules, "int8-per-channel", tensor_shapes(model.checkpoint.config)
    )
    x = builder.input("x", ir.DataType.FLOAT, ["rows", 80])
    builder.output(emitter.emit(DOWN, x), ["rows", 48])
    ir.save(builder.model("linear", "test", "0"), tmp_path / "linear.onnx")
    step = np.float32(recipe.modules[DOWN].activation_scale)
    steps = np.random.default_rng(0).integers(-127, 128, (7, 80))
    weight, scale = quantize_weight(model.checkpoint.tensor(f"{DOWN}.weight"), "int8-per-channel")
    expected = (steps @ weight.astype(np.int64)).astype(np.float64) * np.float64(step) * scale.astype(np.float64)
    session = ort.InferenceSession(tmp_path / "linear.onnx", session_options(1))
    actual = session.run(None, {"x": steps.astype(np.float32) * step})[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["plain", "prefix"])
def test_float16_graph_is_statistically_close(tmp_path: Path, prefix: tuple[int, ...]) -> None:
    model = tiny_llama()
    recipe = quantized_recipe(model, {DOWN: "float16"}, prefix)
    export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / "bundle")
    ids = tokens(2, 12)
    actual, expected = CachedSession(tmp_path / "bundle").run(ids), simulated_logits(model, recipe, ids)
    # Half-precision rounding flips INT8 roundings; the flips cost no more than the INT8 step itself does.
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.1 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("scheme", ["int8-per-channel", "int8-per-tensor"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnx_runtime_fuses_every_quantized_product(tmp_path: Path, dtype: Dtype, scheme: Any) -> None:
    model = tiny_llama(biases=True)
    recipe = quantized_recipe(model, {DOWN: dtype}, PREFIX, Scheme(weights=scheme))
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), tmp_path / "bundle")
    CachedSession(tmp_path / "bundle", tmp_path / "optimized.onnx")
    kinds = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    assert kinds["MatMulIntegerToFloat"] == 13
    assert kinds["DequantizeLinear"] == 0
    assert kinds["MatMul"] == 2  # the kept linear and the head


def quantized_graph(folder: Path, dtype: Dtype, kept: Mapping[str, Dtype] | None = None) -> onnx.GraphProto:
    model = tiny_llama()
    export_bundle(model.checkpoint, quantized_recipe(model, kept), ExportOptions(dtype), folder / "bundle")
    return onnx.load(folder / "bundle" / "model.onnx").graph


def test_every_consumer_has_its_own_quantizer_with_a_bit_equal_scale(tmp_path: Path) -> None:
    graph = quantized_graph(tmp_path, "float32")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 14
    assert len({node.input[2] for node in quantizers}) == 14
    for layer in range(2):
        scales = {
            values[f"model.layers.{layer}.self_attn.{name}_proj.input_scale"].tobytes() for name in ("q", "k", "v")
        }
        assert len(scales) == 1
    assert all(values[node.input[1]].dtype == np.float32 for node in quantizers)
    assert values["model.layers.0.mlp.up_proj.weight"].shape == (48, 80)
    assert values["model.layers.0.mlp.up_proj.weight"].dtype == np.int8


def test_norms_and_glu_reach_the_quantizer_in_float32(tmp_path: Path) -> None:
    """No round trip through 16 bit, where a spike could overflow."""
    graph = quantized_graph(tmp_path, "float16", {DOWN: "float16"})
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            expected = {"o_proj": "Cast", "down_proj": "Mul"}
            assert producers[node.input[0]].op_type == expected.get(node.name.split(".")[-2], "RMSNormalization")
    down = next(node for node in graph.node if node.name == f"{DOWN}.MatMul")
    assert producers[down.input[0]].name == "model.layers.1.mlp.product_to_float16"


def test_nodes_of_a_linear_say_its_plan(tmp_path: Path) -> None:
    graph = quantized_graph(tmp_path, "float16", {DOWN: "float16"})
    properties = {node.name: {item.key: item.value for item in node.metadata_props} for node in graph.node}
    assert properties[f"{DOWN}.MatMul"] == {"module": DOWN, "precision": "float16", "ratio": "900.5"}
    up = "model.layers.1.mlp.up_proj"
    for label in ("QuantizeLinear", "DequantizeLinear", "DequantizeLinear_weight", "MatMul"):
        assert properties[f"{up}.{label}"] == {"module": up, "precision": "int8", "ratio": "3.25"}
