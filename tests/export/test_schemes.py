"""Every quantization scheme in the graph against the torch simulation, and what ONNX Runtime makes of it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2ForCausalLM

from spike_export.artifacts.errors import RecipeError
from spike_export.artifacts.recipe import (
    AttentionPlan,
    Dtype,
    ModulePlan,
    Prefix,
    Recipe,
    RotationPlan,
    Scheme,
    WeightScheme,
    activation_scale,
)
from spike_export.calibration.decoder.equivalent.equivalent_weights import equivalent_checkpoint, transformed_checkpoint
from spike_export.calibration.decoder.equivalent.hadamard import hadamard_plan
from spike_export.calibration.decoder.equivalent.smoothing import smoothing_plan
from spike_export.calibration.decoder.layerwise import Decoder
from spike_export.calibration.decoder.simulate import QuantizedWeights, Simulation, fake_quantize_tokens
from spike_export.calibration.decoder.weight_quantization import quantize_weight
from spike_export.checkpoint.checkpoint import EMBEDDING, LM_HEAD, Checkpoint
from spike_export.checkpoint.decoder_config import decoder_config, tensor_shapes
from spike_export.engines.onnx_runtime.session import session_options
from spike_export.export.bundle import ExportOptions, export_bundle
from spike_export.export.graph.graph_builder import GraphBuilder
from spike_export.export.graph.linear import LinearEmitter
from tests.support.graph_parity import token_errors
from tests.support.tiny.models import CachedSession, MemoryTensors, TinyModel, tiny_llama, tiny_recipe

PREFIX = (5, 1, 9)
DOWN = "model.layers.1.mlp.down_proj"
CHUNKS = ((), (5, 1, 6), (1,) * 12)
"""Prefill, chunked prefill, decode."""

BLOCK_INPUTS = ("self_attn.q_proj", "mlp.up_proj")

INT8_EVERYWHERE = 14
"""Linears of the two layers."""


def tokens(batch: int = 2, length: int = 12) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, 99, (batch, length))


@dataclass(frozen=True)
class Case:
    """A scheme: `per_token` modules have no static scale, `weight_only` ones are W8A16; all, or those named."""

    per_token: tuple[str, ...] | None = ()
    weight_only: tuple[str, ...] | None = ()
    attention: bool = False
    equivalent: bool = False
    hadamard: bool = False
    values: bool = False
    inputs: bool = False
    prefix: tuple[int, ...] = ()
    weights: WeightScheme = "int8-per-channel"
    model: Mapping[str, Any] = field(default_factory=dict)


CASES: Mapping[str, Case] = {
    "static": Case(),
    "static-tensor": Case(weights="int8-per-tensor"),
    "token": Case(per_token=None),
    "token-tensor-biases": Case(per_token=None, weights="int8-per-tensor", model={"biases": True}),
    "mixed": Case(per_token=(DOWN, *(f"model.layers.0.self_attn.{part}_proj" for part in "qkv"))),
    "weights": Case(weight_only=None),
    "weights-tensor-biases": Case(weight_only=None, weights="int8-per-tensor", model={"biases": True}),
    "excluded": Case(weight_only=(DOWN, "model.layers.0.self_attn.o_proj")),
    "attention": Case(attention=True),
    "equivalent-tied": Case(equivalent=True, model={"tie": True}),
    "hadamard": Case(hadamard=True),
    "values": Case(values=True, model={"biases": True}),
    "inputs": Case(inputs=True, model={"biases": True}),
    "hadamard-equivalent-mixed": Case(hadamard=True, equivalent=True, per_token=(DOWN,)),
    "prefix": Case(prefix=PREFIX),
    "all-window": Case(
        per_token=None,
        weight_only=(DOWN,),
        attention=True,
        equivalent=True,
        hadamard=True,
        values=True,
        inputs=True,
        prefix=PREFIX,
        model={"sliding_window": 6, "tie": True},
    ),
}


def measured(checkpoint: Checkpoint, prefix: tuple[int, ...]) -> dict[str, float]:
    """Steps of every linear's input, and of `<block>.query|key|value`."""
    steps: dict[str, float] = {}

    @contextmanager
    def observe(index: int, layer: Any) -> Iterator[None]:
        def note(name: str, values: torch.Tensor) -> None:
            steps[f"model.layers.{index}.{name}"] = activation_scale(values.abs().max().item())

        def operands(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            for name, values in zip(("query", "key", "value"), states, strict=True):
                note(f"self_attn.{name}", values)
            return states

        handles = [
            linear.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
            for name, linear in layer.named_modules()
            if isinstance(linear, torch.nn.Linear)
        ]
        layer.self_attn.operands = operands
        yield
        layer.self_attn.operands = None
        for handle in handles:
            handle.remove()

    Decoder(checkpoint).run(tokens(), prefix, visits=(observe,))
    return steps


def recipe_of(case: Case, checkpoint: Checkpoint, dtype: Dtype = "float32") -> Recipe:
    rotation, smoothing, layers = None, {}, range(checkpoint.config.num_hidden_layers)
    hadamard = hadamard_plan(checkpoint.config.inner_size) if case.hadamard else None
    if case.equivalent:
        random = np.random.default_rng(7)
        widths = {"self_attn.q_proj": 48, "self_attn.o_proj": 32, "mlp.up_proj": 48, "mlp.down_proj": 80}
        rotation = RotationPlan(kind="hadamard", seed=11)
        smoothing = {
            f"model.layers.{layer}.{name}": smoothing_plan(
                "smoothquant", 0.5, np.exp2(random.uniform(-2, 2, width)).astype(np.float32)
            )
            for layer in layers
            for name, width in widths.items()
        }
    values = {f"model.layers.{layer}.self_attn.o_proj": 8 for layer in layers} if case.values else {}
    inputs = {f"model.layers.{layer}.{name}": 16 for layer in layers for name in BLOCK_INPUTS} if case.inputs else {}
    equivalent = equivalent_checkpoint(checkpoint, rotation, smoothing, hadamard, values, inputs)
    steps = measured(equivalent, case.prefix)
    blocks = [f"model.layers.{layer}.self_attn" for layer in layers]
    attention = {
        block: AttentionPlan(query=steps[f"{block}.query"], key=steps[f"{block}.key"], value=steps[f"{block}.value"])
        for block in blocks
    }
    base = tiny_recipe(checkpoint, steps)
    named = base.modules if case.per_token is None else case.per_token
    own = {name: base.modules[name].model_copy(update={"activations": "per-token"}) for name in named}
    kept = base.modules if case.weight_only is None else case.weight_only
    return Recipe(
        model=base.model,
        corpus=base.corpus,
        scheme=Scheme(weights=case.weights),
        alpha=None,
        prefix=Prefix(token_ids=case.prefix, text="?", ratio=1.0) if case.prefix else None,
        modules={**base.modules, **own, **dict.fromkeys(kept, ModulePlan(precision=dtype, weights="int8"))},
        attention=attention if case.attention else {},
        rotation=rotation,
        hadamard=hadamard,
        input_hadamard=inputs,
        smoothing=smoothing,
        value_rotation=values,
    )


def simulated(checkpoint: Checkpoint, recipe: Recipe) -> NDArray[np.float32]:
    decoder = Decoder(transformed_checkpoint(checkpoint, recipe))
    simulation = Simulation(recipe.modules, QuantizedWeights(recipe.scheme.weights), recipe.attention)
    states = decoder.run(tokens(), recipe.prefix_ids, visits=(simulation.visit,))
    logits: NDArray[np.float32] = decoder.head().logits(states.get(0)).numpy()
    return logits


SUMMATION = 1e-5
"""Without a rounding flip only float32 summation differs: at most 80 terms of 6e-8 each through two layers, 5e-6 (seen:
7e-7). Where two summation orders straddle a rounding boundary, one value moves by a step (1 / 127 of its range), and
that token and later ones may differ by up to 1e-2 (`FLIP`)."""
FLIP = 1e-2


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    case = CASES[request.param]
    model = tiny_llama(**case.model)
    recipe = recipe_of(case, model.checkpoint)
    bundle = tmp_path_factory.mktemp(request.param) / "bundle"
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), bundle)
    return request.param, bundle, simulated(model.checkpoint, recipe)


def test_float32_graph_equals_the_simulation(exported: tuple[str, Path, Any]) -> None:
    _, bundle, expected = exported
    session = CachedSession(bundle)
    for chunks in CHUNKS:
        error = token_errors(session.run(tokens(), chunks), expected)
        assert np.median(error) < SUMMATION
        assert error.max() < FLIP


UP = "model.layers.0.mlp.up_proj"
PLANTED: Mapping[str, tuple[str, float]] = {
    "static": (f"{UP}.input_scale", 1.05),
    "static-tensor": (f"{UP}.weight_scale", 1.01),
    "token": ("float32.127.0", 126 / 127),
    "token-tensor-biases": (f"{UP}.bias", 1.05),
    "mixed": ("float32.127.0", 126 / 127),
    "weights": (f"{UP}.weight_scale", 1.01),
    "weights-tensor-biases": (f"{UP}.weight_scale", 1.01),
    "excluded": (f"{DOWN}.weight_scale", 1.01),
    "attention": ("model.layers.1.self_attn.key_scale", 1.05),
    "equivalent-tied": ("model.layers.1.input_layernorm.weight", 1.01),
    "hadamard": ("hadamard.16", 1.01),
    "hadamard-equivalent-mixed": ("hadamard.16", 1.01),
    "values": ("model.layers.0.self_attn.o_proj.weight_scale", 1.01),
    "inputs": ("hadamard.16", 1.01),
    "prefix": ("model.layers.0.self_attn.prefix_key", 1.05),
    "all-window": ("model.layers.0.self_attn.value_scale", 1.05),
}
"""Case → an initializer of its graph that is to be wrong, and the factor by which it is."""


def test_a_planted_fault_is_noticed(exported: tuple[str, Path, Any], tmp_path: Path) -> None:
    case, bundle, expected = exported
    name, factor = PLANTED[case]
    model = onnx.load(bundle / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(model, tmp_path / "model.onnx")
    assert np.median(token_errors(CachedSession(tmp_path).run(tokens()), expected)) > 10 * SUMMATION


@pytest.mark.parametrize("name", ["token", "weights", "attention", "equivalent-tied", "all-window"])
def test_float16_graph_is_statistically_close(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = tiny_llama(**case.model)
    recipe = recipe_of(case, model.checkpoint, "float16")
    export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / "bundle")
    actual, expected = CachedSession(tmp_path / "bundle").run(tokens(), (5, 7)), simulated(model.checkpoint, recipe)
    states = Decoder(model.checkpoint).run(tokens(), recipe.prefix_ids)
    unquantized = Decoder(model.checkpoint).head().logits(states.get(0)).numpy()
    # Half-precision rounding flips INT8 roundings; the flips cost less than quantization itself does.
    assert np.mean((actual - expected) ** 2) < np.mean((expected - unquantized) ** 2)


def operators(bundle: Path, optimized: Path | None = None) -> Counter[str]:
    """Count the operators of the stored graph, or of what ONNX Runtime makes of it."""
    if optimized is not None:
        CachedSession(bundle, optimized)
    graph = onnx.load(optimized or bundle / "model.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("weights", ["int8-per-channel", "int8-per-tensor"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnx_runtime_fuses_every_per_token_product(tmp_path: Path, dtype: Dtype, weights: WeightScheme) -> None:
    model = tiny_llama(biases=True)
    recipe = recipe_of(Case(per_token=None, weights=weights, prefix=PREFIX), model.checkpoint)
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), tmp_path / "bundle")
    kinds = operators(tmp_path / "bundle", tmp_path / "optimized.onnx")
    assert kinds["MatMulIntegerToFloat"] == INT8_EVERYWHERE
    assert kinds["DequantizeLinear"] == 0
    assert kinds["MatMul"] == 1  # the head
    assert kinds["ReduceMax"] == 2 * 4  # one for each tensor that linears read, however many read it


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnx_runtime_does_not_round_the_input_of_int8_weights(tmp_path: Path, dtype: Dtype) -> None:
    """A MatMulNBits would: it has been made of plain DequantizeLinear and MatMul."""
    model = tiny_llama()
    recipe = recipe_of(Case(weight_only=None), model.checkpoint, dtype)
    export_bundle(model.checkpoint, recipe, ExportOptions(dtype), tmp_path / "bundle")
    kinds = operators(tmp_path / "bundle", tmp_path / "optimized.onnx")
    assert kinds["MatMulNBits"] == 0
    assert kinds["DequantizeLinear"] == INT8_EVERYWHERE
    assert kinds["FusedMatMul"] == INT8_EVERYWHERE  # floating-point products that took the Transpose in
    assert kinds["MatMul"] == 1


def test_int8_attention_leaves_linears_and_attention_fused(tmp_path: Path) -> None:
    model = tiny_llama()
    export_bundle(
        model.checkpoint, recipe_of(Case(attention=True), model.checkpoint), ExportOptions("float32"), tmp_path / "b"
    )
    kinds = operators(tmp_path / "b", tmp_path / "optimized.onnx")
    assert kinds["Attention"] == 2
    # v_proj's product ends in a quantizer, into which ONNX Runtime fuses it.
    assert kinds["MatMulIntegerToFloat"] + kinds["QLinearMatMul"] == INT8_EVERYWHERE


def test_every_per_token_consumer_has_its_own_quantizer_over_a_shared_step(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = recipe_of(Case(per_token=None), model.checkpoint)
    export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / "b")
    graph = onnx.load(tmp_path / "b" / "model.onnx").graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = {node.name: node for node in graph.node if node.op_type == "QuantizeLinear"}
    assert len({node.input[2] for node in quantizers.values()}) == INT8_EVERYWHERE
    assert {values[node.input[1]].tobytes() for node in quantizers.values()} == {np.float32(1).tobytes()}
    attention = "model.layers.1.self_attn"
    assert len({quantizers[f"{attention}.{name}_proj.QuantizeLinear"].input[0] for name in "qkv"}) == 1
    steps = {node.name: node.input[1] for node in graph.node if node.name.endswith("token_rescale")}
    assert len(steps) == INT8_EVERYWHERE
    assert len(set(steps.values())) == 2 * 4


@pytest.mark.usefixtures("denormals_as_before")
@pytest.mark.parametrize("weights", ["int8-per-channel", "int8-per-tensor"])
def test_one_per_token_linear_equals_the_definition(tmp_path: Path, weights: WeightScheme) -> None:
    """Tokens of zeros, of almost nothing and of thousands: each has a step of its own."""
    model = tiny_llama()
    builder = GraphBuilder()
    plans = {DOWN: ModulePlan(precision="int8", activations="per-token")}
    emitter = LinearEmitter(builder, model.checkpoint, plans, weights, tensor_shapes(model.checkpoint.config))
    x = builder.input("x", ir.DataType.FLOAT, ["rows", 80])
    builder.output(emitter.emit(DOWN, x), ["rows", 48])
    ir.save(builder.model("linear", "test", "0"), tmp_path / "linear.onnx")
    inputs = np.random.default_rng(0).standard_normal((6, 80)).astype(np.float32)
    inputs *= np.array([0, 1e-7, 1e-5, 1, 30, 1e4], np.float32)[:, None]
    quantized, scale = quantize_weight(model.checkpoint.tensor(f"{DOWN}.weight"), weights)
    restored = fake_quantize_tokens(torch.from_numpy(inputs)).numpy().astype(np.float64)
    expected = restored @ (quantized.astype(np.float64) * scale)
    actual = ort.InferenceSession(tmp_path / "linear.onnx", session_options(1)).run(None, {"x": inputs})[0]
    assert not actual[0].any()
    error = np.abs(actual - expected)[1:].max(axis=1) / np.abs(expected)[1:].max(axis=1)
    assert error.max() < 1e-6  # integer arithmetic and three float32 scales


def test_the_cache_holds_the_prefix_exactly_and_the_rest_in_steps(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = recipe_of(Case(attention=True, prefix=PREFIX), model.checkpoint)
    export_bundle(model.checkpoint, recipe, ExportOptions("float32"), tmp_path / "b")
    session = CachedSession(tmp_path / "b")
    session.run(tokens(), (5, 7))
    stored = Decoder(model.checkpoint).prefix_key_values(PREFIX)
    for layer, (key, value) in enumerate(stored):
        plan = recipe.attention[f"model.layers.{layer}.self_attn"]
        for slot, (cached, step) in enumerate(((key, plan.key), (value, plan.value))):
            present = session.cache[2 * layer + slot]
            np.testing.assert_array_equal(present[0, :, :3], cached)
            multiples = present[:, :, 3:] / np.float32(step)
            np.testing.assert_allclose(multiples, np.rint(multiples), atol=1e-4)


def test_manifest_tells_the_number_formats_apart(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = recipe_of(Case(weight_only=(DOWN,)), model.checkpoint, "float16")
    kept = {**recipe.modules, UP: ModulePlan(precision="float16")}
    recipe = recipe.model_copy(update={"modules": kept})
    manifest = export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / "b")
    counts = {kind: share.modules for kind, share in manifest.linears.items()}
    assert counts == {"int8": 12, "float16+int8-weights": 1, "float16": 1}
    assert sum(share.mac_share for share in manifest.linears.values()) == pytest.approx(1)
    graph = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types[f"{DOWN}.weight"] == onnx.TensorProto.INT8
    assert types[f"{DOWN}.weight_scale"] == onnx.TensorProto.FLOAT
    noted = {node.name: {item.key: item.value for item in node.metadata_props} for node in graph.node}
    assert noted[f"{DOWN}.MatMul"]["precision"] == "float16+int8-weights"


def test_a_rotated_tied_model_is_shipped_untied_and_reproducibly(tmp_path: Path) -> None:
    model = tiny_llama(tie=True)
    recipe = recipe_of(Case(equivalent=True), model.checkpoint)
    for name in ("one", "two"):
        export_bundle(model.checkpoint, recipe, ExportOptions("float16"), tmp_path / name)
    first, second = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert first == second
    assert json.loads(first["config.json"])["tie_word_embeddings"] is False
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "one" / "model.onnx").graph.initializer}
    embedding, head = (onnx.numpy_helper.to_array(stored[name]) for name in (EMBEDDING, LM_HEAD))
    assert embedding.shape == (99, 48)
    assert head.shape == (48, 99)
    assert np.abs(embedding - head.T).max() > 0.01  # the final norm's gain went into the head alone
    bytes_of = {key: int(value) for key, value in _places(tmp_path / "one", (EMBEDDING, LM_HEAD)).items()}
    assert bytes_of[EMBEDDING] != bytes_of[LM_HEAD]


def _places(bundle: Path, names: tuple[str, ...]) -> dict[str, str]:
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    external = {t.name: {entry.key: entry.value for entry in t.external_data} for t in graph.initializer}
    return {name: external[name]["offset"] for name in names}


def test_an_attention_block_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    recipe = recipe_of(Case(attention=True), model.checkpoint)
    plan = recipe.attention["model.layers.0.self_attn"]
    recipe = recipe.model_copy(update={"attention": {"model.layers.2.self_attn": plan}})
    with pytest.raises(RecipeError, match=r"model\.layers\.2\.self_attn"):
        export_bundle(model.checkpoint, recipe, ExportOptions(), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def tiny_qwen2(**changes: Any) -> TinyModel:
    """Qwen2: biases on q, k, v only."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=False,
        attn_implementation="eager",
        **changes,
    )
    reference = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in reference.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    settings = decoder_config(config.to_dict(), "tiny")
    return TinyModel(reference, Checkpoint("tiny", settings, MemoryTensors(tensors), None, {}))


@pytest.mark.parametrize("window", [None, 6])
def test_qwen2_equals_transformers(tmp_path: Path, window: int | None) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    model = tiny_qwen2(**sliding)
    export_bundle(model.checkpoint, None, ExportOptions("float32"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    expected = model.reference(torch.from_numpy(tokens())).logits.numpy()
    for chunks in CHUNKS:
        assert token_errors(CachedSession(tmp_path / "b").run(tokens(), chunks), expected).max() < 2e-5
